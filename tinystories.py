"""Data sets: text, vocabulary, tokens, batches.

    python tinystories.py toy --vocab_size=512                # stories written by a small generator, no network
    python tinystories.py download [--version=v1|v2]          # TinyStories from Hugging Face, resumable
    python tinystories.py local TRAIN.txt [--val=VAL.txt]     # any text of your own
    python tinystories.py train_vocab --dataset=NAME --vocab_size=512    # or --from=tokenizer.model: one that exists
    python tinystories.py pretokenize --dataset=NAME --vocab_size=512

The first three write `data/<dataset>/{train,val}.txt`, stories separated by <|endoftext|> lines, and
go straight on to the last two where --vocab_size is given. Those write `data/<dataset>/tok<V>/`:
`tokenizer.model`, `tokenizer.bin` (for run.c) and `{train,val}.bin`, token ids with BOS before each
story, uint16 (uint32 above 65,535). V = 259 is the byte tokenizer. What is already there is left as
it is: delete `data/<dataset>` or its `tok<V>` to start again.

TinyStories: Eldan & Li 2023 (arXiv 2305.07759). What this leaves out on purpose: shards, and any
cleaning of the text.
"""

from system.program import program

import argparse
import filecmp
import io
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import requests
import sentencepiece
import torch
from tqdm import tqdm

from system.files import atomic_write
from text import toystories
from text.tokenizer import (
    BOS,
    BYTE_VOCAB_SIZE,
    MAX_VOCAB_SIZE,
    ByteTokenizer,
    Tokenizer,
    bin_bytes,
    load_tokenizer,
    open_tokenizer,
    vocab_folder,
    write_bin,
)

END = "<|endoftext|>"
SPLITS = ("train", "val")
GENERATED = ("arithmetic", "induction", "polynomial")  # data sets that synthetic.py makes
VOCAB_TEXT = 200_000_000  # characters of train.txt that train_vocab looks at; a vocabulary needs no more
LONGEST_LINE = 100_000  # characters; SentencePiece passes over lines that are too long for it, so they are cut
DOWNLOADS = {  # version: {split: file}
    "v1": {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"},
    "v2": {"train": "TinyStoriesV2-GPT4-train.txt", "val": "TinyStoriesV2-GPT4-valid.txt"},
}
DATA_SETS = {"tinystories": "v1", "tinystories_v2": "v2"}  # where `download` puts each version
HUGGING_FACE = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"


# ---------------------------------------------------------------------------------------------
# text

def read_stories(path: Path) -> Iterator[str]:
    """The stories of a file: .jsonl with a `text` field, <|endoftext|> separated, or blank-line blocks.

    Errors: ValueError naming the file and line if it cannot be read or holds no story.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            if path.suffix == ".json":
                raise ValueError(f"{path}: expected text or .jsonl, one object a line")
            if path.suffix == ".jsonl":
                pieces = jsonl_texts(f, path)
            else:
                marked = any(END in line for line in f)
                f.seek(0)
                pieces = split_at_marks(f) if marked else split_at_blank_lines(f)
            empty = True
            for piece in pieces:
                # A marker inside a .jsonl text would end the story early once written out.
                story = piece.replace("\r\n", "\n").replace(END, " ").strip()
                if story:
                    empty = False
                    yield story
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}") from error
    if empty:
        raise ValueError(f"{path}: holds no story")


def jsonl_texts(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode("utf-8")  # refuses half a surrogate pair, which JSON allows
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}:{number}: expected {{"text": "..."}}, found {line.strip()[:60]!r}')
            yield text


def split_at_marks(lines: Iterable[str]) -> Iterator[str]:
    story = []
    for line in lines:
        *ended, rest = line.split(END)
        for part in ended:
            yield "".join(story) + part
            story = []
        story.append(rest)
    yield "".join(story)


def split_at_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    story = []
    for line in lines:
        if line.strip():
            story.append(line)
        else:
            yield "".join(story)
            story = []
    yield "".join(story)


def write_texts(folder: Path, train: Iterable[str], val: Iterable[str]) -> None:
    """Write `folder`/{train,val}.txt, both or neither; leave equal files alone, refuse to replace different ones."""
    texts = {folder / "train.txt": train, folder / "val.txt": val}
    new = {path: path.with_name(path.name + ".new") for path in texts}
    try:
        for path, stories in texts.items():
            with atomic_write(new[path], "w", encoding="utf-8", newline="\n") as f:
                for story in tqdm(stories, desc=str(path), unit=" stories", file=sys.stderr):
                    f.write(story + "\n" + END + "\n")
        changed = [path for path in texts if not (path.exists() and filecmp.cmp(new[path], path, shallow=False))]
        for path in changed:
            if path.exists():  # tokens made from it would go stale
                raise ValueError(f"{path}: holds other text already; choose another --dataset, or delete {folder}")
        for path in changed:
            os.replace(new[path], path)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)


def make_toy(folder: Path) -> None:
    """Write the generated stories of text/toystories.py."""
    write_texts(folder, toystories.stories("train", toystories.TRAIN_STORIES),
                toystories.stories("val", toystories.VAL_STORIES))


def make_local(folder: Path, train: Path, val: Path | None) -> None:
    """Write the stories of a user's files; without `val`, every hundredth story of `train` is held out."""
    if val is not None:
        write_texts(folder, read_stories(train), read_stories(val))
        return
    count = sum(1 for _ in read_stories(train))
    if count < 2:
        raise ValueError(f"{train}: {count} story cannot be split; separate stories by {END} lines or name --val=FILE")
    every = min(100, count)
    write_texts(folder, (s for k, s in enumerate(read_stories(train)) if k % every != every - 1),
                (s for k, s in enumerate(read_stories(train)) if k % every == every - 1))


# ---------------------------------------------------------------------------------------------
# download

def download(folder: Path, version: str, base_url: str = HUGGING_FACE) -> None:
    """Fetch both text files of a TinyStories version into `folder`; continues where an earlier call was cut off."""
    for split, name in DOWNLOADS[version].items():
        fetch(f"{base_url}/{name}", folder / f"{split}.txt")


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path` by way of a .part file, which a later call continues (HTTP range requests).

    Errors: ValueError naming the address if the server cannot be reached, refuses, or ends early.
    """
    part = path.with_name(url.rpartition("/")[2] + ".part")  # its remote name: no other file is continued by mistake
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        size = remote_size(url)
        if path.exists():
            if path.stat().st_size == size:
                print(f"{path}: already complete", file=sys.stderr)
                return
            raise ValueError(f"{path}: expected the {size:,} bytes of {url}, found {path.stat().st_size:,}; "
                             f"choose another --dataset, or delete {path.parent}")
        have = part.stat().st_size if part.exists() else 0
        if have > size:  # not a beginning of this file
            part.unlink()
            have = 0
        if have < size:
            append(url, part, have, size)
    except requests.RequestException as error:
        kept = f" ({part.stat().st_size:,} bytes are kept; the same command continues)" if part.exists() else ""
        raise ValueError(
            f"{url}: {explain(error)}{kept}\n"
            "without network: `python tinystories.py toy` writes stories made here, and\n"
            "`python tinystories.py local TRAIN.txt` takes any text file") from error
    except OSError as error:
        raise ValueError(f"{part}: cannot write: {error.strerror}") from error
    if part.stat().st_size != size:
        raise ValueError(f"{url}: expected {size:,} bytes, found {part.stat().st_size:,}; the same command continues")
    os.replace(part, path)


def remote_size(url: str) -> int:
    """The length of the file behind `url`, before anything is fetched."""
    # identity: a length of compressed bytes would not be the file's
    answer = requests.head(url, allow_redirects=True, timeout=30, headers={"Accept-Encoding": "identity"})
    answer.raise_for_status()
    try:
        return int(answer.headers["Content-Length"])
    except (KeyError, ValueError):
        raise ValueError(f"{url}: the server does not say how long the file is") from None


def append(url: str, part: Path, have: int, size: int) -> None:
    """Fetch bytes have..size of `url` onto the end of `part`; from the start if the server ignores ranges."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, stream=True, timeout=30, headers=headers) as answer:
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0
        bar = tqdm(desc=part.stem, total=size, initial=have, unit="B", unit_scale=True, file=sys.stderr)
        with open(part, "ab" if have else "wb") as f, bar:
            # Small blocks: when the connection is cut, the block on its way is lost.
            for block in answer.iter_content(1 << 14):
                f.write(block)
                bar.update(len(block))


def explain(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, (requests.ConnectionError, requests.Timeout)):
        return "no connection"
    return str(error)


# ---------------------------------------------------------------------------------------------
# vocabulary and tokens

def train_vocab(folder: Path, vocab_size: int) -> None:
    """Train a SentencePiece BPE vocabulary on `folder`/train.txt, with the settings llama2.c uses."""
    out = vocab_folder(folder, vocab_size)
    if vocab_size == BYTE_VOCAB_SIZE:
        write_bin(ByteTokenizer(), out / "tokenizer.bin")
        return
    text = folder / "train.txt"
    if not already_there(out / "tokenizer.model", text):
        print(f"{out / 'tokenizer.model'}: training {vocab_size} tokens", file=sys.stderr)
        model, failure = io.BytesIO(), []

        def lines() -> Iterator[str]:
            try:
                yield from text_lines(text)
            except BaseException as error:  # SentencePiece would make an internal error of it, of Ctrl-C too
                failure.append(error)
                raise

        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines(), model_writer=model,
                model_type="bpe", vocab_size=vocab_size, byte_fallback=True, split_digits=True,
                normalization_rule_name="identity", character_coverage=1.0, allow_whitespace_only_pieces=True,
                remove_extra_whitespaces=False,  # run.c leaves spaces as they are, too
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
    """Make a tokenizer, read from `source`, the data set's vocabulary of its size; never replace another one."""
    out = vocab_folder(folder, tokenizer.vocab_size)
    model = out / "tokenizer.model"
    if model.exists():
        if bin_bytes(open_tokenizer(model, tokenizer.vocab_size)) != bin_bytes(tokenizer):
            raise ValueError(f"{model}: holds another vocabulary than {source}; choose another --dataset, "
                             f"or delete {out}")
    elif tokenizer.vocab_size != BYTE_VOCAB_SIZE:  # bytes need no tokenizer.model
        with atomic_write(model) as f:
            f.write(tokenizer.file)
    write_bin(tokenizer, out / "tokenizer.bin")
    print(f"{out}: has the {tokenizer.vocab_size:,} tokens of {source}", file=sys.stderr)


def already_there(path: Path, source: Path) -> bool:
    """Was `path` made before? ValueError if `source`, which it was made from, is newer."""
    if not path.exists():
        return False
    if source.exists() and source.stat().st_mtime_ns > path.stat().st_mtime_ns:
        raise ValueError(f"{path}: older than {source}; delete {path.parent} to make it again")
    print(f"{path}: already there", file=sys.stderr)
    return True


def text_lines(path: Path, limit: int = VOCAB_TEXT) -> Iterator[str]:
    """Lines of the stories in the first `limit` characters of a text made by write_texts; long ones in parts."""
    if not path.exists():
        raise ValueError(f"{path}: no such text; {how_to_make(path.parent)}")
    for story in read_stories(path):
        for line in filter(None, story.split("\n")):
            yield from (line[i : i + LONGEST_LINE] for i in range(0, len(line), LONGEST_LINE))
        limit -= len(story)
        if limit < 0:
            return


def pretokenize(folder: Path, vocab_size: int, workers: int = 0) -> None:
    """Write `tok<V>/{train,val}.bin`, with as many processes as there are cores unless `workers` says."""
    out = vocab_folder(folder, vocab_size)
    write_bin(load_tokenizer(out, vocab_size), out / "tokenizer.bin")  # the byte tokenizer needs no train_vocab
    for split in SPLITS:
        if not already_there(out / f"{split}.bin", folder / f"{split}.txt"):
            tokenize_file(folder / f"{split}.txt", out / f"{split}.bin", vocab_size, workers or os.cpu_count() or 1)


def tokenize_file(text: Path, tokens: Path, vocab_size: int, workers: int) -> None:
    encode = partial(encode_stories, tokens.parent, vocab_size)
    stories, bar = read_stories(text), tqdm(desc=str(tokens), unit=" stories", file=sys.stderr)
    batches = iter(lambda: list(islice(stories, 1000)), [])
    with atomic_write(tokens) as f, bar, ProcessPoolExecutor(workers) as pool:
        pending: deque = deque()  # in the order of the text, and few: a large text does not fit in memory
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
                    f.write(future.result())
                    bar.update(count)
        except BrokenProcessPool as error:
            raise ValueError(f"{tokens}: a worker process died (out of memory?); nothing was written") from error
        finally:
            pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)
def cached_tokenizer(folder: Path, vocab_size: int):
    return load_tokenizer(folder, vocab_size)


def encode_stories(folder: Path, vocab_size: int, stories: list[str]) -> bytes:
    """BOS and the tokens of each story, as the bytes of a .bin file."""
    tokenizer = cached_tokenizer(folder, vocab_size)  # loaded once in each worker
    ids = [i for story in stories for i in (BOS, *tokenizer.encode(story))]
    return np.array(ids, dtype=token_type(vocab_size)).tobytes()


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


# ---------------------------------------------------------------------------------------------
# batches

def how_to_make(folder: Path, vocab_size: int | None = None) -> str:
    """The commands that make the data set `folder`, with its tokens of a vocabulary of that size."""
    name = folder.name
    if name in GENERATED:
        return f"make it with\n    python synthetic.py {name}"
    options = f" --dataset={name}"
    if vocab_size is not None:
        options += f" --vocab_size={vocab_size}"
    if str(folder.parent) != "data":
        options += f" --data_dir={folder.parent}"
    if (folder / "train.txt").exists():
        commands = ["train_vocab", "pretokenize"]
    elif name == "toy":
        commands = ["toy"]
    elif name in DATA_SETS:
        commands = [f"download --version={DATA_SETS[name]}", "local FILE"]
    else:
        commands = ["local FILE"]
    one_of = "one of" if "local FILE" in commands[1:] else ""
    return f"make it with {one_of}".rstrip() + "".join(f"\n    python tinystories.py {c}{options}" for c in commands)


class Windows:
    """The rows of a token file: window j holds tokens j*T .. j*T + T, inputs and next tokens of one row.

    fraction: of the file, from its beginning, that there is taken to be.
    Errors: ValueError naming the file, and the command that makes it, if it is missing, has no
    whole window, or holds ids that the vocabulary has not.
    """

    def __init__(self, path: Path, vocab_size: int, T: int, fraction: float = 1.0):
        if not path.exists():
            raise ValueError(f"{path}: no such data set; {how_to_make(path.parent.parent, vocab_size)}")
        self.path, self.T = path, T
        itemsize = np.dtype(token_type(vocab_size)).itemsize
        if not path.is_file():
            raise ValueError(f"{path}: expected a file of token ids")
        size = path.stat().st_size
        if size % itemsize or size // itemsize <= T:
            raise ValueError(f"{path}: expected more than {T} tokens of {itemsize} bytes each, found {size} bytes")
        try:
            self.tokens = np.memmap(path, dtype=token_type(vocab_size), mode="r")
        except OSError as error:
            raise ValueError(f"{path}: cannot read: {error.strerror}") from error
        if (largest := int(self.tokens.max())) >= vocab_size:
            raise ValueError(f"{path}: expected token ids below {vocab_size}, found {largest}")
        if (kept := int(len(self.tokens) * fraction)) <= T:
            raise ValueError(f"{path}: {fraction:g} of it has {kept} tokens, expected more than {T}")
        self.tokens = self.tokens[:kept]

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.T

    def rows(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs x and next tokens y of the windows `indices`, both (len(indices), T) int64."""
        T = self.T
        both = torch.from_numpy(np.stack([self.tokens[j * T : j * T + T + 1] for j in indices]).astype(np.int64))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


class TrainBatches:
    """Every window once an epoch, in an order that only (seed, epoch) decide; rank r takes its share of it.

    Batch k needs nothing but k, so a resumed run sees what it would have seen; and what all ranks
    see together in an iteration does not depend on how many they are.
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.windows, self.batch_size, self.seed, self.rank, self.world = windows, batch_size, seed, rank, world
        self._order = lru_cache(maxsize=2)(self._shuffle)  # a batch may straddle two epochs

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.windows))

    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Micro-batch k of this rank: x, y, both (batch_size, T) int64."""
        first = (k * self.world + self.rank) * self.batch_size
        n = len(self.windows)
        return self.windows.rows(self._order(s // n)[s % n] for s in range(first, first + self.batch_size))


EVAL_BATCH = 32  # windows; fixed, so that every run is judged on the same ones, whatever its batch_size


def eval_windows(windows: Windows, count: int) -> list[np.ndarray]:
    """`count` times the numbers of EVAL_BATCH windows, evenly spread over the file; all if there are no more."""
    chosen = np.linspace(0, len(windows) - 1, min(count * EVAL_BATCH, len(windows))).round().astype(int)
    return [chosen[k : k + EVAL_BATCH] for k in range(0, len(chosen), EVAL_BATCH)]


def eval_batches(windows: Windows, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of eval_windows."""
    return [windows.rows(chosen) for chosen in eval_windows(windows, count)]


# ---------------------------------------------------------------------------------------------
# command line

def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, dataset: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of all data sets (default: data)")
        sub.add_argument("--dataset", help=f"name of the data set (default: {dataset})")
        sub.add_argument("--vocab_size", type=vocab_size, help="tokens; 259 is the byte tokenizer")
        if name != "pretokenize":
            sub.add_argument("--from", dest="source", type=Path, metavar="FILE",
                             help="take the vocabulary of this tokenizer.model or tokenizer.bin; none is trained")
        return sub

    command("toy", "write generated stories", "toy")
    sub = command("download", "fetch TinyStories from Hugging Face", "tinystories, or tinystories_v2")
    sub.add_argument("--version", choices=tuple(DOWNLOADS), default="v1",
                     help="v1: GPT-3.5 and GPT-4 (default); v2: GPT-4 only")
    sub = command("local", "take stories from a file of your own", "the name of the file")
    sub.add_argument("train", type=Path, metavar="TRAIN", help=f".txt with {END} lines or blank lines, or .jsonl")
    sub.add_argument("--val", type=Path, help="validation stories; without it one story in a hundred is held out")
    command("train_vocab", "train a vocabulary on a data set's text, or take one that exists", "tinystories")
    sub = command("pretokenize", "turn a data set's text into tokens", "tinystories")
    sub.add_argument("--workers", type=int, default=0, choices=range(65), metavar="N", help="processes; 0: one a core")
    args = parser.parse_args(argv)
    if args.command in ("train_vocab", "pretokenize") and not (args.vocab_size or getattr(args, "source", None)):
        parser.error(f"{args.command}: needs --vocab_size")
    if args.dataset is None:
        args.dataset = default_name(args)
    return args


def default_name(args: argparse.Namespace) -> str:
    """The data set's name where the command line has none."""
    if args.command == "local":
        return args.train.stem
    if args.command == "download":
        return next(name for name, version in DATA_SETS.items() if version == args.version)
    return "toy" if args.command == "toy" else "tinystories"


def vocab_size(text: str) -> int:
    value = int(text)
    if not BYTE_VOCAB_SIZE <= value <= MAX_VOCAB_SIZE:
        raise argparse.ArgumentTypeError(f"expected {BYTE_VOCAB_SIZE} (bytes) to {MAX_VOCAB_SIZE}, found {value}")
    return value


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    folder, wanted, source = args.data_dir / args.dataset, args.vocab_size, getattr(args, "source", None)
    if source:  # opened first: a bad file is refused before the download, not after it
        tokenizer = open_tokenizer(source, wanted)
        wanted = tokenizer.vocab_size
    match args.command:
        case "toy":
            make_toy(folder)
        case "download":
            download(folder, args.version)
        case "local":
            make_local(folder, args.train, args.val)
    if source:
        take_vocab(folder, tokenizer, source)
    elif wanted and args.command != "pretokenize":
        train_vocab(folder, wanted)
    if wanted and args.command != "train_vocab":
        pretokenize(folder, wanted, getattr(args, "workers", 0))
        print(f"{folder}: train with --dataset={args.dataset} --vocab_size={wanted}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(program(main, "interrupted; the same command starts again or continues"))
