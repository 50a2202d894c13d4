"""Data sets: text, vocabulary, tokens, batches.

    python tinystories.py toy --vocab_size=512          # stories from a small generator; needs no network
    python tinystories.py download [--version=v1|v2]    # TinyStories from Hugging Face; continues if cut off
    python tinystories.py local FILE... [--val=FILE]    # your own stories, or prompts and answers (doc/data.md)
    python tinystories.py train_vocab --dataset=NAME --vocab_size=512    # or --from=tokenizer.model, which exists
    python tinystories.py pretokenize --dataset=NAME --vocab_size=512

The first three write `data/<dataset>/{train,val}.txt`, each story followed by an <|endoftext|> line, or
.jsonl for prompts and answers. With --vocab_size or --from they go on to the last two, which write
`data/<dataset>/tok<V>/`: `tokenizer.model`, `tokenizer.bin` (for run.c) and `{train,val}.bin`, token ids
with BOS before each story, uint16 (uint32 above 65,535). V = 259 is the byte tokenizer. Existing files
are kept: delete `data/<dataset>` or its `tok<V>` to start again.

--from=FILE takes the vocabulary of a SentencePiece model (Llama 2's tokenizer.model, V = 32,000), of
llama2.c's tokenizer.bin, or of a tokenizer.json.

TinyStories: Eldan & Li 2023 (arXiv 2305.07759). The text is not cleaned.
"""

from system.program import between, program

import argparse
import filecmp
import io
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from system.download import fetch
from system.files import atomic_write, refuse_irregular
from text import toystories
from text.stories import END, SEPARATORS, Story, StoryFile, files_of, read_stories, stem_of
from text.tokenizer import (
    BYTE_VOCAB_SIZE,
    EOS,
    MAX_VOCAB_SIZE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
    vocab_folder,
    write_bin,
)
from text.tokenizer_json import TOKENIZER, JsonTokenizer

SPLITS = ("train", "val")
ANSWER, FIRST = 1, 2  # bits of a mask: a token of an answer, the first token of an example
GENERATED = ("arithmetic", "induction", "polynomial")  # data sets that synthetic.py makes
VOCAB_TEXT = 200_000_000  # characters of train.txt that train_vocab reads; a vocabulary needs no more
LONGEST_LINE = 100_000  # characters; SentencePiece skips lines that are too long, so they are cut
DOWNLOADS = {  # version: {split: file}
    "v1": {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"},
    "v2": {"train": "TinyStoriesV2-GPT4-train.txt", "val": "TinyStoriesV2-GPT4-valid.txt"},
}
DATA_SETS = {"tinystories": "v1", "tinystories_v2": "v2"}  # where `download` puts each version
WITHOUT_NETWORK = """
without network: `python tinystories.py toy` writes stories made here, and
`python tinystories.py local TRAIN.txt` takes any text file"""
SHARD = re.compile(r"data\d+\.(json|bin)")  # llama2.c's names: data00.json of TinyStories_all_data, data00.bin
HUGGING_FACE = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"


# ---------------------------------------------------------------------------------------------
# text

def write_stories(folder: Path, stories: Iterable[tuple[str, Story]]) -> None:
    """Write `folder`/{train,val}.txt, or .jsonl for examples; both files or neither. stories: (split, story).

    A file that exists is kept. Errors: ValueError if its content differs, or a split has no story.
    """
    stories = iter(stories)
    first = next(stories, ("train", ""))
    ending = ".txt" if isinstance(first[1], str) else ".jsonl"
    paths = {split: folder / (split + ending) for split in SPLITS}
    new = {split: path.with_name(path.name + ".new") for split, path in paths.items()}
    counts = dict.fromkeys(SPLITS, 0)
    try:
        with ExitStack() as files:
            out = {split: files.enter_context(atomic_write(path, "w", encoding="utf-8", newline="\n"))
                   for split, path in new.items()}
            for split, story in chain([first], stories):
                if isinstance(story, str) != isinstance(first[1], str):
                    raise ValueError(f"{folder}: stories and examples with prompts cannot be in one data set")
                counts[split] += 1
                out[split].write(f"{story}\n{END}\n" if ending == ".txt" else json.dumps({"turns": story}) + "\n")
        if empty := [split for split in SPLITS if not counts[split]]:
            raise ValueError(f"{folder}: no story is left for {empty[0]}")
        changed = [split for split in SPLITS
                   if not (paths[split].exists() and filecmp.cmp(new[split], paths[split], shallow=False))]
        for split in changed:
            if (there := text_of(folder, split)).exists():  # tokens made from it would go stale
                raise ValueError(f"{there}: holds other text already; choose another --dataset, or delete {folder}")
        for split in changed:
            os.replace(new[split], paths[split])
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)
    train, val = counts.values()
    tqdm.write(f"{folder}: {train:,} stories for training, {val:,} for validation", file=sys.stderr)


def text_of(folder: Path, split: str) -> Path:
    """The file with the stories or examples of a split: .jsonl if it exists, else .txt."""
    examples = folder / f"{split}.jsonl"
    return examples if examples.exists() else folder / f"{split}.txt"


def make_toy(folder: Path) -> None:
    """Write the generated stories of text/toystories.py."""
    stories = chain((("train", s) for s in toystories.stories("train", toystories.TRAIN_STORIES)),
                    (("val", s) for s in toystories.stories("val", toystories.VAL_STORIES)))
    write_stories(folder, tqdm(stories, str(folder), toystories.TRAIN_STORIES + toystories.VAL_STORIES,
                               unit=" stories", file=sys.stderr))


def make_local(folder: Path, train: list[Path], val: list[Path], field: str | None, separator: str) -> None:
    """Write the stories of a user's files.

    Without `val`, llama2.c's first shard is held out, as llama2.c does; of other files every hundredth story is, or
    the last one if there are fewer.
    """
    if not val and len(train) > 1 and all(SHARD.fullmatch(path.name) for path in train):
        train = sorted(train)
        val, train = train[:1], train[1:]
        print(f"{val[0]}: validation, as in llama2.c", file=sys.stderr)
    with progress(str(folder), train + val) as advance:

        def read(paths: list[Path]) -> Iterator[Story]:
            for path in paths:
                file = StoryFile(path, field, separator)
                yield from file.read(advance)
                tqdm.write(str(file), file=sys.stderr)

        if val:
            write_stories(folder, chain((("train", s) for s in read(train)), (("val", s) for s in read(val))))
        else:
            write_stories(folder, hold_out(read(train)))


def hold_out(stories: Iterable[Story]) -> Iterator[tuple[str, Story]]:
    """(split, story) for each story: every hundredth one is for validation; the last one if there are fewer."""
    stories, number = iter(stories), 1
    story = next(stories)
    for following in stories:
        yield "train" if number % 100 else "val", story
        story, number = following, number + 1
    if number == 1:
        raise ValueError(f"1 story cannot be split; separate stories by {END} lines, say how they are with "
                         "--separator, or name --val=FILE")
    yield "val" if number < 100 or number % 100 == 0 else "train", story


@contextmanager
def progress(name: str, paths: list[Path]) -> Iterator[Callable[[int], object]]:
    """A progress bar over the bytes of some files; yields the function that advances it."""
    size = sum(path.stat().st_size for path in paths if path.is_file())
    with tqdm(desc=name, total=size, unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield bar.update


# ---------------------------------------------------------------------------------------------
# download

def download(folder: Path, version: str, base_url: str = HUGGING_FACE) -> None:
    """Fetch both text files of a TinyStories version into `folder`; continues where an earlier call was cut off."""
    for split, name in DOWNLOADS[version].items():
        fetch(f"{base_url}/{name}", folder / f"{split}.txt", WITHOUT_NETWORK)


# ---------------------------------------------------------------------------------------------
# tokens made by llama2.c

def vocabulary_beside(folder: Path) -> Path | None:
    """The vocabulary that llama2.c keeps next to a folder of shards, or None: data/tok4096.model for data/tok4096."""
    path = folder.absolute().with_name(folder.absolute().name + ".model")
    return path if path.exists() else None


def link_shards(folder: Path, shards: list[Path], vocab_size: int | None) -> None:
    """Use llama2.c's data*.bin without copying them: the data set gets links.

    Errors: ValueError if the vocabulary's size is unknown, a name is not llama2.c's, or the data set has other tokens.
    """
    if vocab_size is None:
        raise ValueError(f"{shards[0]}: which vocabulary does it use? Give --vocab_size, or --from=tokenizer.model")
    if strangers := [path for path in shards if not SHARD.fullmatch(path.name)]:
        raise ValueError(f"{strangers[0]}: expected llama2.c's names, data00.bin, data01.bin and so on")
    out, links = vocab_folder(folder, vocab_size), {path.name: path.resolve() for path in shards}
    if len(shards) < 2 or len(links) < len(shards):
        raise ValueError(f"{shards[0]}: expected two shards or more, with different names; the first validates")
    there = {path.name: path.resolve() for path in out.glob("*.bin") if path.name != "tokenizer.bin"}
    if there and there != links:
        raise ValueError(f"{out}: holds other tokens already; choose another --dataset, or delete {out}")
    out.mkdir(parents=True, exist_ok=True)
    for name in links.keys() - there:
        (out / name).symlink_to(links[name])
    print(f"{out}: links to {len(shards)} shards; {shards[0].name} validates", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# vocabulary and tokens

def train_vocab(folder: Path, vocab_size: int) -> None:
    """Train a SentencePiece BPE vocabulary on `folder`/train.txt, with the settings llama2.c uses."""
    out = vocab_folder(folder, vocab_size)
    if vocab_size == BYTE_VOCAB_SIZE:
        write_bin(ByteTokenizer(), out / "tokenizer.bin")
        return
    text = text_of(folder, "train")
    if not already_there(out / "tokenizer.model", text):
        print(f"{out / 'tokenizer.model'}: training {vocab_size} tokens", file=sys.stderr)
        model, failure = io.BytesIO(), []

        def lines() -> Iterator[str]:
            try:
                yield from text_lines(text)
            except BaseException as error:  # SentencePiece would report any of them, Ctrl-C too, as an internal error
                failure.append(error)
                raise

        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines(), model_writer=model,
                model_type="bpe", vocab_size=vocab_size, byte_fallback=True, split_digits=True,
                normalization_rule_name="identity", character_coverage=1.0, allow_whitespace_only_pieces=True,
                remove_extra_whitespaces=False,  # as in run.c, which keeps all spaces
                unk_surface=r" \342\201\207 ", max_sentence_length=1 << 20,
                num_threads=os.cpu_count(), minloglevel=2)
        except RuntimeError as error:
            if failure:
                raise failure[0] from None
            reason = str(error).partition("\n")[0].rpartition("] ")[2].strip()
            raise ValueError(f"{text}: cannot make a vocabulary of --vocab_size={vocab_size} from it; a short text "
                             f"needs a smaller one, many different characters a larger one. {reason}") from error
        with atomic_write(out / "tokenizer.model") as f:
            f.write(model.getvalue())
    write_bin(load_tokenizer(out, vocab_size), out / "tokenizer.bin")


def take_vocab(folder: Path, tokenizer: Tokenizer, source: Path) -> None:
    """Make a tokenizer, read from `source`, the data set's vocabulary of that size; never replace another one."""
    out = vocab_folder(folder, tokenizer.vocab_size)
    if any((out / name).exists() for name in ("tokenizer.model", TOKENIZER)):
        there = load_tokenizer(out, tokenizer.vocab_size)
        if list(there.pieces()) != list(tokenizer.pieces()):
            raise ValueError(f"{out}: holds another vocabulary than {source}; choose another --dataset, "
                             f"or delete {out}")
    elif isinstance(tokenizer, JsonTokenizer):
        tokenizer.write(out)
    elif tokenizer.vocab_size != BYTE_VOCAB_SIZE:  # bytes need no tokenizer.model
        with atomic_write(out / "tokenizer.model") as f:
            f.write(tokenizer.file)
    write_run_vocab(tokenizer, out)
    print(f"{out}: has the {tokenizer.vocab_size:,} tokens of {source}", file=sys.stderr)


def write_run_vocab(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.bin, which run.c reads; it cannot hold a vocabulary of tokenizer.json."""
    if not isinstance(tokenizer, JsonTokenizer):
        write_bin(tokenizer, out / "tokenizer.bin")


def already_there(path: Path, source: Path) -> bool:
    """True if `path` exists. Errors: ValueError if `source`, from which it was made, is newer."""
    if not path.exists():
        return False
    if source.exists() and source.stat().st_mtime_ns > path.stat().st_mtime_ns:
        raise ValueError(f"{path}: older than {source}; delete {path.parent} to make it again")
    print(f"{path}: already there", file=sys.stderr)
    return True


def text_lines(path: Path, limit: int = VOCAB_TEXT) -> Iterator[str]:
    """Lines of the stories in the first `limit` characters of a data set's text; long lines in parts."""
    if not path.exists():
        raise ValueError(f"{path}: no such text; {how_to_make(path.parent)}")
    for story in read_stories(path):
        text = story if isinstance(story, str) else "\n".join(chain.from_iterable(story))
        for line in filter(None, text.split("\n")):
            yield from (line[i : i + LONGEST_LINE] for i in range(0, len(line), LONGEST_LINE))
        limit -= len(text)
        if limit < 0:
            return


def pretokenize(folder: Path, vocab_size: int, workers: int = 0) -> None:
    """Write `tok<V>/{train,val}.bin`. workers: processes; 0: one per core."""
    out = vocab_folder(folder, vocab_size)
    write_run_vocab(load_tokenizer(out, vocab_size), out)  # the byte tokenizer needs no train_vocab
    for split in SPLITS:
        text = text_of(folder, split)
        if not already_there(out / f"{split}.bin", text):
            tokenize_file(text, out / f"{split}.bin", vocab_size, workers or os.cpu_count() or 1)


def mask_of(tokens: Path) -> Path:
    """The file of a token file's mask: train.mask.bin for train.bin."""
    return tokens.with_suffix(".mask.bin")


def tokenize_file(text: Path, tokens: Path, vocab_size: int, workers: int) -> None:
    """Write the tokens of a text, and their mask if it has examples."""
    encode = partial(encode_stories, tokens.parent, vocab_size)
    counts = np.zeros(3, dtype=np.int64)  # stories, tokens, answer tokens
    with ExitStack() as stack:
        # The last file is moved into place first, so tokens of examples never exist without their mask.
        files = [stack.enter_context(atomic_write(tokens))]
        if text.suffix == ".jsonl":
            files.append(stack.enter_context(atomic_write(mask_of(tokens))))
        advance = stack.enter_context(progress(str(tokens), [text]))
        stories = StoryFile(text).read(advance)
        batches = iter(lambda: list(islice(stories, 1000)), [])
        pool = stack.enter_context(ProcessPoolExecutor(workers))
        pending: deque = deque()  # batches in the order of the text; few, since a large text does not fit in memory
        try:
            while pending or batches is not None:
                while batches is not None and len(pending) < 2 * workers:
                    batch = next(batches, None)
                    if batch is None:
                        batches = None
                    else:
                        pending.append((len(batch), pool.submit(encode, batch)))
                if pending:
                    count, future = pending.popleft()
                    ids, mask = future.result()
                    for f, content in zip(files, (ids, mask)):
                        f.write(content.tobytes())
                    counts += count, len(ids), np.count_nonzero(mask & ANSWER)
        except BrokenProcessPool as error:
            raise ValueError(f"{tokens}: a worker process died (out of memory?); nothing was written") from error
        finally:
            pool.shutdown(cancel_futures=True)
    answers = f", {counts[2]:,} of them in answers" if text.suffix == ".jsonl" else ""
    print(f"{tokens}: {counts[1]:,} tokens of {counts[0]:,} stories{answers}", file=sys.stderr)


@lru_cache(maxsize=1)
def cached_tokenizer(folder: Path, vocab_size: int):
    return load_tokenizer(folder, vocab_size)


def encode_stories(folder: Path, vocab_size: int, stories: list[Story]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of stories and examples, and their mask: ANSWER, FIRST or 0 for each token (all 0 for stories).

    A story is BOS and its tokens. Each turn of an example is BOS, prompt, answer, EOS. Prompt and answer are encoded
    separately, so a prompt's tokens are those of a prompt that is typed. If the vocabulary has no EOS, BOS ends a turn.
    """
    tokenizer = cached_tokenizer(folder, vocab_size)  # loaded once in each worker
    bos = tokenizer.bos
    eos = tokenizer.ends[0] if tokenizer.ends else bos
    ids, mask = [], []
    for story in stories:
        if isinstance(story, str):
            ids += bos, *tokenizer.encode(story)
            continue
        first = len(ids)
        for prompt, answer in story:
            given, wanted = [bos, *tokenizer.encode(prompt)], [*tokenizer.encode(answer), eos]
            ids += given + wanted
            mask += [0] * len(given) + [ANSWER] * len(wanted)
        mask[first] |= FIRST
    mask += [0] * (len(ids) - len(mask))
    return np.array(ids, dtype=token_type(vocab_size)), np.array(mask, dtype=np.uint8)


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


# ---------------------------------------------------------------------------------------------
# batches

def how_to_make(folder: Path, vocab_size: int | None = None) -> str:
    """The commands that make the data set `folder`, and its tokens if `vocab_size` is given."""
    name = folder.name
    if name in GENERATED:
        return f"make it with\n    python synthetic.py {name}"
    options = f" --dataset={name}"
    if vocab_size is not None:
        options += f" --vocab_size={vocab_size}"
    if str(folder.parent) != "data":
        options += f" --data_dir={folder.parent}"
    if text_of(folder, "train").exists():
        commands = ["train_vocab", "pretokenize"]
    elif name == "toy":
        commands = ["toy"]
    elif name in DATA_SETS:
        commands = [f"download --version={DATA_SETS[name]}", "local FILE"]
    else:
        commands = ["local FILE"]
    one_of = "one of" if "local FILE" in commands[1:] else ""
    return f"make it with {one_of}".rstrip() + "".join(f"\n    python tinystories.py {c}{options}" for c in commands)


class Joined:
    """The first `length` tokens of several files, as one array that is read on demand."""

    def __init__(self, parts: list[np.ndarray], length: int):
        self.parts, self.length = parts, length
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, wanted: slice) -> np.ndarray:
        begin, end, _ = wanted.indices(self.length)
        pieces = []
        for part, part_end in zip(self.parts, self.ends.tolist()):
            part_begin = part_end - len(part)
            if part_begin < end and begin < part_end:
                pieces.append(part[max(begin - part_begin, 0) : end - part_begin])
        return np.concatenate(pieces)


def token_files(path: Path) -> list[Path]:
    """The files behind train.bin or val.bin: that file, or llama2.c's shards in its folder, the first for val."""
    if path.exists():
        return [path]
    shards = sorted(p for p in path.parent.glob("data*.bin") if SHARD.fullmatch(p.name))
    if len(shards) < 2:
        return []
    return shards[:1] if path.stem == "val" else shards[1:]


def need_tokens(path: Path, vocab_size: int) -> list[Path]:
    """token_files(path). Errors: ValueError naming the command that makes them, if there are none."""
    files = token_files(path)
    if not files:
        raise ValueError(f"{path}: no such data set; {how_to_make(path.parent.parent, vocab_size)}")
    return files


def map_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The tokens of a file, memory-mapped. Errors: ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of token ids")
    kind = np.dtype(token_type(vocab_size))
    size = path.stat().st_size
    if size == 0 or size % kind.itemsize:
        raise ValueError(f"{path}: expected tokens of {kind.itemsize} bytes each, found {size} bytes")
    try:
        tokens = np.memmap(path, dtype=kind, mode="r")
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}") from error
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(f"{path}: expected token ids below {vocab_size}, found {largest}")
    return tokens


def map_mask(tokens: Path, length: int) -> np.ndarray | None:
    """The mask of a file of `length` tokens, a byte for each (encode_stories); None if it has none.

    Errors: ValueError if it is not of that length.
    """
    path = mask_of(tokens)
    if not path.exists():
        if text_of(tokens.parent.parent, tokens.stem).suffix == ".jsonl":  # all tokens would become targets
            raise ValueError(f"{path}: no such mask; delete {tokens}, and pretokenize again")
        return None
    refuse_irregular(path)
    if path.stat().st_size != length:
        raise ValueError(f"{path}: expected {length:,} bytes, one for each token of {tokens}, "
                         f"found {path.stat().st_size:,}; delete {tokens} and it, and pretokenize again")
    return np.memmap(path, dtype=np.uint8, mode="r")


def rows_of_examples(mask: np.ndarray, T: int) -> np.ndarray:
    """(rows, 2) int64: where the tokens of each row begin and end. A row has up to T + 1 tokens, all of one example.

    An example that is longer goes on in the next row; a row without a token of an answer to predict is left out.
    """
    begins = np.flatnonzero(mask & FIRST)
    lengths = np.diff(begins, append=len(mask))
    counts = np.maximum(-(-(lengths - 1) // T), 0)  # rows of each example: all tokens but the first are targets
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # 0, 1, ... within each example
    first = np.repeat(begins, counts) + nth * T
    end = np.minimum(first + T + 1, np.repeat(begins + lengths, counts))
    answers = np.flatnonzero(mask & ANSWER)
    has_answer = np.searchsorted(answers, first + 1) < np.searchsorted(answers, end)
    return np.stack([first, end], axis=1)[has_answer]


class Windows:
    """The rows of a token file: window j holds tokens j*T .. j*T + T, inputs and next tokens of one row.

    If the file has a mask, of prompts and answers, a row is one example instead, or a part of it if it is too long;
    the rest of the row is EOS and not a target. With `pack`, rows are windows all the same.

    fraction: use only this leading part of the file.
    Errors: ValueError naming the file, and the command that makes it, if it is missing, has no
    whole window, or holds ids that the vocabulary does not have.
    """

    def __init__(self, path: Path, vocab_size: int, T: int, fraction: float = 1.0, pack: bool = False):
        self.path, self.T = path, T
        parts = [map_tokens(file, vocab_size) for file in need_tokens(path, vocab_size)]
        kept = int(sum(map(len, parts)) * fraction)
        part = f"{fraction:g} of it" if fraction < 1.0 else "it"
        self.tokens = parts[0][:kept] if len(parts) == 1 else Joined(parts, kept)
        self.mask, self.examples = None, None  # (tokens,) uint8; (rows, 2), where each row begins and ends
        if (mask := map_mask(path, len(parts[0]))) is not None:
            self.mask = mask[:kept]
        if self.mask is not None and not pack:
            self.examples = rows_of_examples(self.mask, T)
            if not len(self.examples):
                raise ValueError(f"{path}: {part} holds no answer")
        elif kept <= T:
            raise ValueError(f"{path}: {part} has {kept} tokens, expected more than {T}")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.T if self.examples is None else len(self.examples)

    def spans(self, indices: Iterable[int]) -> np.ndarray:
        """(len(indices), 2) int64: where the tokens of each of these windows begin and end in the file."""
        j = np.fromiter(indices, dtype=np.int64)
        return np.stack([j * self.T, j * self.T + self.T + 1], axis=1) if self.examples is None else self.examples[j]

    def rows(self, indices: Iterable[int]) -> tuple[torch.Tensor, ...]:
        """Inputs x and next tokens y of the windows `indices`, both (len(indices), T) int64.

        Where there is a mask, also which of y are tokens of answers, (len(indices), T) bool.
        """
        T, spans = self.T, self.spans(indices).tolist()
        tokens = np.full((len(spans), T + 1), EOS, dtype=np.int64)
        answers = np.zeros((len(spans), T + 1), dtype=bool)
        for k, (begin, end) in enumerate(spans):
            tokens[k, : end - begin] = self.tokens[begin:end]
            if self.mask is not None:
                answers[k, : end - begin] = self.mask[begin:end] & ANSWER
        x, y = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())
        return (x, y) if self.mask is None else (x, y, torch.from_numpy(answers[:, 1:].copy()))


class Resident:
    """A copy of a file's tokens, and of its mask, in the memory of a device, which gathers rows there.

    machine: has the device and puts small tensors there (step.machine.Machine).
    """

    PIECE = 1 << 24  # tokens that are copied at a time: the host need not hold the whole file

    def __init__(self, windows: Windows, machine):
        self.machine = machine
        self.tokens = self._copy(windows.tokens)
        self.mask = None if windows.mask is None else self._copy(windows.mask)

    @staticmethod
    def size(windows: Windows) -> int:
        """Bytes that a copy takes."""
        per_token = windows.tokens[:1].itemsize + (windows.mask is not None)
        return len(windows.tokens) * per_token

    def _copy(self, values: "np.ndarray | Joined") -> torch.Tensor:
        """Of as many bytes a number; tokens as signed numbers, which devices index faster or at all."""
        signed = {1: np.uint8, 2: np.int16, 4: np.int32}[values[:1].itemsize]
        copy = torch.empty(len(values), dtype=torch.from_numpy(np.empty(0, signed)).dtype, device=self.machine.device)
        for begin in range(0, len(values), self.PIECE):
            piece = np.array(values[begin : begin + self.PIECE]).view(signed)
            copy[begin : begin + self.PIECE] = torch.from_numpy(piece)
        return copy

    def rows(self, windows: Windows, indices: Iterable[int]) -> tuple[torch.Tensor, ...]:
        """windows.rows(indices), the same numbers, on the device."""
        spans, = self.machine.put(torch.from_numpy(windows.spans(indices)))
        place = spans[:, :1] + torch.arange(windows.T + 1, device=spans.device)  # (rows, T + 1)
        inside = place < spans[:, 1:]
        place = place.clamp(max=len(self.tokens) - 1)
        unsigned = (1 << 8 * self.tokens.element_size()) - 1
        tokens = torch.where(inside, self.tokens[place].long() & unsigned, EOS)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.mask is None:
            return x, y
        answers = (self.mask[place] & ANSWER).bool() & inside
        return x, y, answers[:, 1:].contiguous()


class TrainBatches:
    """Every window once per epoch, in an order that depends only on (seed, epoch); each rank takes its share.

    Batch k depends only on k, so a resumed run sees the same data; what all ranks together see in an
    iteration does not depend on how many there are.
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                 resident: Resident | None = None):
        """resident: where rows are gathered, a copy of the windows' file on a device; None: from the file."""
        self.windows, self.batch_size, self.seed, self.rank, self.world = windows, batch_size, seed, rank, world
        self.rows = windows.rows if resident is None else partial(resident.rows, windows)
        self._order = lru_cache(maxsize=2)(self._shuffle)  # a batch may straddle two epochs

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.windows))

    def __getitem__(self, k: int) -> tuple[torch.Tensor, ...]:
        """Micro-batch k of this rank: x, y, both (batch_size, T) int64, and answers where there is a mask."""
        first = (k * self.world + self.rank) * self.batch_size
        n = len(self.windows)
        return self.rows(self._order(s // n)[s % n] for s in range(first, first + self.batch_size))


EVAL_BATCH = 32  # windows; fixed, so that all runs are evaluated on the same ones, whatever their batch_size


def eval_windows(windows: Windows, count: int) -> list[np.ndarray]:
    """The numbers of `count` batches of EVAL_BATCH windows, evenly spread over the file; at most of all windows."""
    chosen = np.linspace(0, len(windows) - 1, min(count * EVAL_BATCH, len(windows))).round().astype(int)
    return [chosen[k : k + EVAL_BATCH] for k in range(0, len(chosen), EVAL_BATCH)]


def eval_batches(windows: Windows, count: int) -> list[tuple[torch.Tensor, ...]]:
    """The rows of eval_windows."""
    return [windows.rows(chosen) for chosen in eval_windows(windows, count)]


# ---------------------------------------------------------------------------------------------
# command line

def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, dataset: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of all data sets (default: data)")
        sub.add_argument("--dataset", help=f"name of the data set (default: {dataset})")
        sub.add_argument("--vocab_size", type=between(BYTE_VOCAB_SIZE, MAX_VOCAB_SIZE),
                         help="tokens; 259 is the byte tokenizer")
        if name != "pretokenize":
            sub.add_argument("--from", dest="source", type=Path, metavar="FILE",
                             help="take the vocabulary of a tokenizer.model, .bin or .json; none is trained")
        return sub

    command("toy", "write generated stories", "toy")
    sub = command("download", "fetch TinyStories from Hugging Face", "tinystories, or tinystories_v2")
    sub.add_argument("--version", choices=tuple(DOWNLOADS), default="v1",
                     help="v1: GPT-3.5 and GPT-4 (default); v2: GPT-4 only")
    sub = command("local", "take stories from files of your own", "the name of the file or folder")
    sub.add_argument("train", nargs="+", metavar="TRAIN", help="text, .json, .jsonl, .parquet, each also .gz or .zst; "
                     "files, folders or globs; or llama2.c's folder of data*.json or data*.bin")
    sub.add_argument("--val", action="append", default=[], metavar="VAL",
                     help="validation stories; without it one story in a hundred is held out")
    sub.add_argument("--field", metavar="NAME", help="where an object has its text (default: text or story)")
    sub.add_argument("--separator", choices=SEPARATORS, default="auto",
                     help=f"what is between the stories of a text: marks are {END} (default: auto)")
    command("train_vocab", "train a vocabulary on a data set's text, or take one that exists", "tinystories")
    sub = command("pretokenize", "turn a data set's text into tokens", "tinystories")
    sub.add_argument("--workers", type=between(0, 64), default=0, metavar="N", help="processes; 0: one per core")
    args = parser.parse_args(argv)
    if args.command in ("train_vocab", "pretokenize") and not (args.vocab_size or getattr(args, "source", None)):
        parser.error(f"{args.command}: needs --vocab_size")
    if args.dataset is None:
        args.dataset = default_name(args)
    return args


def default_name(args: argparse.Namespace) -> str:
    """The data set's name where the command line has none."""
    if args.command == "local":
        path = Path(args.train[0]).absolute()
        if len(args.train) == 1 and not path.exists() and not set("*?[") & set(args.train[0]):
            raise ValueError(f"{args.train[0]}: no such file or folder")
        if len(args.train) > 1 or not path.exists():
            raise ValueError("local: several files need a name for the data set: --dataset=NAME")
        return path.name if path.is_dir() else stem_of(path)
    if args.command == "download":
        return next(name for name, version in DATA_SETS.items() if version == args.version)
    return "toy" if args.command == "toy" else "tinystories"


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    folder, wanted, source = args.data_dir / args.dataset, args.vocab_size, getattr(args, "source", None)
    files = files_of(args.train) if args.command == "local" else []
    are_tokens = bool(files) and all(path.suffix == ".bin" for path in files)
    if are_tokens and not source:
        source = vocabulary_beside(files[0].parent)
    # First, so that a bad vocabulary is refused before a long download.
    tokenizer = open_tokenizer(source, wanted) if source else None
    if tokenizer:
        wanted = tokenizer.vocab_size
    match args.command:
        case "toy":
            make_toy(folder)
        case "download":
            download(folder, args.version)
        case "local" if are_tokens:
            link_shards(folder, files, wanted)
        case "local":
            make_local(folder, files, files_of(args.val), args.field, args.separator)
    if tokenizer:
        take_vocab(folder, tokenizer, source)
    if not are_tokens and wanted:
        if not tokenizer and args.command != "pretokenize":
            train_vocab(folder, wanted)
        if args.command != "train_vocab":
            pretokenize(folder, wanted, getattr(args, "workers", 0))
    if wanted and args.command != "train_vocab":
        print(f"{folder}: train with --dataset={args.dataset} --vocab_size={wanted}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(program(main, "interrupted; the same command starts again or continues"))
