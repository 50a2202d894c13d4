"""Tasks with a known answer: does a model that looks ahead learn to get it right?

    python synthetic.py arithmetic                    # start + k * step, modulo 31
    python synthetic.py induction --vocab_size=512    # stories with names to remember; needs a text data set
    python synthetic.py polynomial                    # sums, products, compositions over F7[X]/(X^5)

Each writes `data/<dataset>/tok<V>/`, in rows of one length: `train.bin` and `val.bin`, token ids as
tinystories.Windows reads them; `val.answers.bin`, a byte for each token of val.bin, 0 or the group of
the answer that it belongs to; `answers.json`, the names of the groups and what made the data. With
--max_seq_len=LENGTH (the command prints it) window j of train.py is row j. The same seed writes the
same bytes; what is already there is never replaced.

Induction and polynomials: Gloeckle et al. 2024 (arXiv 2404.19737), sections 4.1 and 4.2; doc/synthetic.md
says what differs. What this leaves out on purpose: text for arithmetic and polynomials (ids are all
there is), generation token by token (Answers.score says why it is not needed), vocabularies above 65,536.
"""

from system.program import between, program

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from system.files import atomic_write, refuse_irregular
from text.letters import token_texts
from text.tokenizer import BOS, BYTE_VOCAB_SIZE, EOS, Tokenizer, load_tokenizer, vocab_folder
from tinystories import how_to_make, read_stories

FIRST_ID = 3  # ids below are <unk>, BOS, EOS, as in every vocabulary of this project
Row = tuple[list[int], list[int]]  # tokens from BOS on, and the group of each: 0 is not scored


class Task(NamedTuple):
    """What a generator makes; rows are written in order, and padded with EOS to `length` tokens."""

    vocab_size: int
    length: int
    groups: tuple[str, ...]  # group g of a Row is groups[g - 1]
    train: Iterable[Row]
    val: Iterable[Row]
    files: dict[str, bytes] = {}  # what else the folder gets


# ---------------------------------------------------------------------------------------------
# answers

class Answers:
    """The scored tokens of a val.bin: answer k is its tokens starts[k]..ends[k] - 1, of group groups[k]."""

    def __init__(self, marks: np.ndarray, names: dict[int, str], length: int):
        """marks: (tokens,) uint8, 0 or a group; a maximal run of one group is one answer. length: of a row."""
        self.length = length
        changes = np.flatnonzero(np.diff(marks, prepend=0, append=0))  # where runs begin, and where the last ends
        scored = marks[changes[:-1]] > 0
        self.names, self.starts, self.ends = names, changes[:-1][scored], changes[1:][scored]
        self.groups = marks[self.starts]

    @classmethod
    def find(cls, val: Path) -> "Answers | None":
        """The answers of a val.bin; None if it has none. Errors: ValueError naming the broken file."""
        path, names = val.with_name("val.answers.bin"), val.with_name("answers.json")
        if not path.exists():
            return None
        for file in (path, names):
            refuse_irregular(file)
        try:
            marks, tokens = np.frombuffer(path.read_bytes(), dtype=np.uint8), val.stat().st_size // 2
            about = json.loads(names.read_bytes())
            groups, length = {int(g): str(name) for g, name in about["groups"].items()}, int(about["length"])
            if not all(0 < g < 256 for g in groups):
                raise ValueError("a group is a byte")
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot read: {error.strerror}; delete {val.parent} and make it again "
                             "with synthetic.py") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{names}: expected {{"groups": {{"1": "name", ...}}, "length": ...}}; '
                             f"delete {val.parent} and make it again with synthetic.py") from None
        if len(marks) != tokens:
            raise ValueError(f"{path}: expected {tokens} bytes, one for each token of {val}, found {len(marks)}")
        if nameless := set(np.unique(marks).tolist()) - {0, *groups}:
            raise ValueError(f"{path}: holds group {min(nameless)}, which has no name in {names}")
        return cls(marks, groups, length)

    def score(self, windows: Iterable[int], T: int, best: Tensor, y: Tensor) -> dict[str, tuple[int, int]]:
        """{group: (answers that are right as a whole, answers)} of the windows with these numbers.

        best: (B, T) int64, the most likely token at each position, given the true ones before it; y: (B, T) the
        true next tokens. An answer counts if all of its tokens are targets of its window. If `best` is right at
        every token of an answer, greedy decoding from the token before it writes exactly that answer, and the
        other way round: up to the first mistake both have read the same tokens.
        """
        right, count = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
        for j, wrong in zip(windows, (best != y).cpu().numpy(), strict=True):
            first = j * T + 1  # the target at position t is token first + t of the file
            inside = slice(np.searchsorted(self.starts, first), np.searchsorted(self.ends, first + T, side="right"))
            mistakes = np.concatenate(([0], wrong.cumsum()))  # before each position
            exact = mistakes[self.ends[inside] - first] == mistakes[self.starts[inside] - first]
            count += np.bincount(self.groups[inside], minlength=256)
            right += np.bincount(self.groups[inside][exact], minlength=256)
        return {name: (int(right[g]), int(count[g])) for g, name in self.names.items()}


# ---------------------------------------------------------------------------------------------
# arithmetic progressions

def arithmetic(vocab_size: int, length: int, sequences: int, seed: int) -> Task:
    """Rows BOS, start, start + step, start + 2 step, ... modulo vocab_size - 3; the number n is id n + 3.

    A tenth of all pairs (start, step != 0) are for validation, and the same ones whatever `sequences` is. Two
    numbers decide a row. Scored: the third number, which only the step gives away, and the rest as one answer.
    """
    modulus = vocab_size - FIRST_ID
    rng = random_numbers("arithmetic", seed)
    pairs = [(start, step) for start in range(modulus) for step in range(1, modulus)]
    pairs.sort(key=lambda _: rng.random())
    held_out = len(pairs) // 10
    if sequences > len(pairs) - held_out:
        raise ValueError(f"--sequences={sequences}: expected at most {len(pairs) - held_out}, the pairs of start and "
                         f"step modulo {modulus} less those for validation; a larger --vocab_size has more")

    def row(pair: tuple[int, int]) -> Row:
        numbers = [FIRST_ID + (pair[0] + k * pair[1]) % modulus for k in range(length - 1)]
        return [BOS, *numbers], [0, 0, 0, 1] + [2] * (length - 4)

    train = pairs[held_out : held_out + sequences]
    return Task(vocab_size, length, ("third", "rest"), map(row, train), map(row, pairs[:held_out]))


# ---------------------------------------------------------------------------------------------
# polynomials over F7[X]/(X^5): five coefficients, that of X^0 first

P, DEGREE = 7, 5
NEGATE, ADD, MULTIPLY, COMPOSE, EQUALS = range(FIRST_ID + P, FIRST_ID + P + 5)  # ids 3..9 are the digits 0..6
Polynomial = list[int]


def multiply(f: Polynomial, g: Polynomial) -> Polynomial:
    return [sum(f[i] * g[k - i] for i in range(k + 1)) % P for k in range(DEGREE)]


def compose(f: Polynomial, g: Polynomial) -> Polynomial:
    """f(g(X)) by Horner's rule, of the representatives of degree below 5."""
    value = [0] * DEGREE
    for c in reversed(f):
        value = multiply(value, g)
        value[0] = (value[0] + c) % P
    return value


def expression(rng: random.Random, operations: int) -> tuple[list[int], Polynomial]:
    """A random expression with this number of operations, in prefix notation without parentheses, and its value.

    All four operators are equally likely; one with two operands shares what is left evenly between 0 : n and n : 0.
    """
    if operations == 0:
        value = [draw(rng, P) for _ in range(DEGREE)]
        return [FIRST_ID + c for c in value], value
    operator = NEGATE + draw(rng, 4)
    if operator == NEGATE:
        tokens, f = expression(rng, operations - 1)
        return [NEGATE, *tokens], [-c % P for c in f]
    left = draw(rng, operations)
    (tokens, f), (more, g) = expression(rng, left), expression(rng, operations - 1 - left)
    if operator == ADD:
        value = [(a + b) % P for a, b in zip(f, g, strict=True)]
    else:
        value = multiply(f, g) if operator == MULTIPLY else compose(f, g)
    return [operator, *tokens, *more], value


def polynomial(operations: int, beyond: int, sequences: int, val_sequences: int, seed: int) -> Task:
    """Rows BOS, expression, =, coefficients of its value. In training 1 to `operations` operations, equally likely.

    Validation has `val_sequences` rows for each number of operations, up to `beyond` more; none is in training.
    Scored: the coefficients, as one answer.
    """
    most = operations + beyond
    val_rng, train_rng = random_numbers("polynomial val", seed), random_numbers("polynomial train", seed)
    held_out: dict[tuple[int, ...], Row] = {}  # by its tokens; in the order in which they were drawn

    def row(rng: random.Random, m: int) -> Row:
        tokens, value = expression(rng, m)
        question = [BOS, *tokens, EQUALS]
        return question + [FIRST_ID + c for c in value], [0] * len(question) + [m] * DEGREE

    while len(held_out) < val_sequences * most:
        tokens, marks = row(val_rng, 1 + len(held_out) % most)  # in turns, so that a part of val.bin has all of them
        held_out[tuple(tokens)] = tokens, marks

    def train() -> Iterator[Row]:
        written = 0
        while written < sequences:
            tokens, marks = row(train_rng, 1 + draw(train_rng, operations))
            if tuple(tokens) not in held_out:
                written += 1
                yield tokens, marks

    names = tuple(f"{'in' if m <= operations else 'out'}_{m}" for m in range(1, most + 1))
    length = 1 + most + (most + 1) * DEGREE + 1 + DEGREE  # BOS, operators, operands, =, answer
    return Task(EQUALS + 1, length, names, train(), held_out.values())


# ---------------------------------------------------------------------------------------------
# induction

NAMES = frozenset((  # frequent first names of TinyStories and of text/toystories.py
    "Abby Adam Alex Alice Amy Andy Anna Annie Barbara Bella Ben Benny Billy Bob Bobby Buddy Charlie Cindy Clara "
    "Daisy Dan Danny Dave David Ella Ellie Emily Emma Eva Fin Finn Fluffy Fred Freddy George Harry Jack Jake "
    "James Jane Jen Jenny Jerry Jill Jim Jimmy Joe John Johnny Josh Julie Kate Katie Ken Kevin Kim Kitty Lana "
    "Larry Lena Leo Lila Lily Lisa Liz Lola Lucy Luna Maria Mary Max Maya Mia Mike Millie Milly Mimi Molly Nancy "
    "Nick Nora Oliver Ollie Pam Pete Peter Polly Remy Rex Rob Rosie Roxy Ruby Sally Sam Sammy Sandy Sara Sarah "
    "Sofia Sophie Spot Sue Susie Teddy Tim Timmy Toby Tom Tommy Tony Zoe").split())
NAME = re.compile(rf"\b(?:{'|'.join(sorted(NAMES))})\b")
FIRSTS, SECONDS, VAL_ONE_IN = 16, 16, 10  # made-up names: first tokens, fewest second ones, of ten pairs one for val
MOST_STORIES = 100_000  # read from a split; all of TinyStories would not fit in memory
CONTEXTS = 'Then {0} said, "{0}, look!" {0}\'s hat fell. "{0} is here," said {0}.\n{0} ran with {0} and {0}.'


class Name(NamedTuple):
    first: str
    second: str

    def __str__(self) -> str:
        return self.first + self.second


class Spelling:
    """A tokenizer, and where its tokens are in a text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.texts = tokenizer, token_texts(tokenizer)

    def name_tokens(self, text: str, names: Iterable[Name]) -> tuple[list[int], list[tuple[int, Name]]] | None:
        """Ids of `text`, and for each mention of a name in it the index of its second token.

        None unless every mention is exactly two tokens, the first with or without the space before the name.
        """
        ids, data = self.tokenizer.encode(text), b" " + text.encode("utf-8")
        starts = np.cumsum([0, *(len(self.texts[i]) for i in ids)])  # of each token in `data`; last, the end
        if starts[-1] != len(data):
            return None
        index, spelt, found = {int(s): k for k, s in enumerate(starts)}, {str(n).encode(): n for n in names}, []
        for mention in re.finditer(rb"\b(?:%s)\b" % b"|".join(spelt), data):
            name = spelt[mention[0]]
            second = index.get(mention.start() + len(name.first), 0)
            begins = mention.start() - starts[second - 1]  # 1 where the first token begins with the space
            if begins not in (0, data[mention.start() - 1] == ord(" ")) or index.get(mention.end()) != second + 1:
                return None
            found.append((second, name))
        return ids, found


def invent_names(spelling: Spelling, words: set[str], rng: random.Random) -> list[list[Name]]:
    """Names of two tokens, by first token: each of FIRSTS first tokens with the same second ones, none of `words`.

    Many names, so that it is easier to look back than to learn them all by heart.
    """
    texts = [t.decode("utf-8", errors="replace") for t in spelling.texts[FIRST_ID:]]
    texts = sorted(dict.fromkeys(texts), key=lambda _: rng.random())  # not set(): its order is another in each process
    firsts = list(dict.fromkeys(t.strip() for t in texts if re.fullmatch(" ?[A-Z][a-z]?", t)))[:100]
    seconds = [t for t in texts if re.fullmatch("[a-z]{1,4}", t)][:300]

    def fits(name: Name) -> bool:
        return str(name) not in words and spelling.name_tokens(CONTEXTS.format(name), [name]) is not None

    fitting = {first: {second for second in seconds if fits(Name(first, second))} for first in firsts}
    chosen = sorted(firsts, key=lambda first: -len(fitting[first]))[:FIRSTS]
    common = [second for second in seconds if all(second in fitting[first] for first in chosen)]
    if len(chosen) < FIRSTS or len(common) < SECONDS:
        raise ValueError(f"expected {FIRSTS} first tokens and {SECONDS} that make a name with each of them, "
                         f"found {len(chosen)} and {len(common)}; try another --vocab_size")
    return [[Name(first, second) for second in common] for first in chosen]


def induction(source: Path, vocab_size: int, length: int, sequences: int, seed: int) -> Task:
    """Rows BOS and the beginning of a story, its names replaced by made-up ones; scored: second tokens, again.

    A story's names differ in their first tokens, so the second token of every mention but the first follows from
    what was read. Stories without such a mention within the row, or with one that is not two tokens, are left out.
    """
    folder = vocab_folder(source, vocab_size)
    for path in (source / "train.txt", source / "val.txt"):
        if not path.exists():
            raise ValueError(f"{path}: no such text; {how_to_make(source, vocab_size)}")
    spelling = Spelling(load_tokenizer(folder, vocab_size))
    stories = {split: list(islice(read_stories(source / f"{split}.txt"), MOST_STORIES)) for split in ("train", "val")}
    words = {word for split in stories.values() for story in split for word in re.findall("[A-Za-z]+", story)}
    try:
        names = invent_names(spelling, words, random_numbers("names", seed))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error

    def rows(split: str, limit: int) -> Iterator[Row]:
        # A second token of validation has been seen in training, and so has a first, but never the two together.
        pools = [[name for j, name in enumerate(row) if ((i + j) % VAL_ONE_IN == 0) == (split == "val")]
                 for i, row in enumerate(names)]
        rng, written = random_numbers(f"induction {split}", seed), 0
        for story in stories[split]:
            if written < limit and (made := renamed(story, pools, spelling, length, rng)):
                written += 1
                yield made
        print(f"{split}: {written} of {len(stories[split])} stories", file=sys.stderr)

    files = {name: (folder / name).read_bytes() for name in ("tokenizer.model", "tokenizer.bin")
             if (folder / name).exists()}
    return Task(vocab_size, length, ("again",), rows("train", sequences), rows("val", len(stories["val"])), files)


def renamed(story: str, pools: list[list[Name]], spelling: Spelling, length: int, rng: random.Random) -> Row | None:
    """The row of a story whose names are replaced; None if it is to be left out."""
    old = list(dict.fromkeys(NAME.findall(story)))
    if not 0 < len(old) <= len(pools):
        return None
    some = sorted(pools, key=lambda _: rng.random())[: len(old)]
    new = {name: pool[draw(rng, len(pool))] for name, pool in zip(old, some, strict=True)}
    found = spelling.name_tokens(NAME.sub(lambda match: str(new[match[0]]), story), new.values())
    if found is None:
        return None
    tokens, marks, seen = [BOS, *found[0]], [0] * (1 + len(found[0])), set()
    for second, name in found[1]:
        marks[1 + second] = int(name in seen)
        seen.add(name)
    return (tokens[:length], marks[:length]) if any(marks[:length]) else None


# ---------------------------------------------------------------------------------------------
# files and command line

def random_numbers(what: str, seed: int) -> random.Random:
    return random.Random(f"synthetic/{what}/{seed}")  # a str seeds through sha512, whatever PYTHONHASHSEED is


def draw(rng: random.Random, n: int) -> int:
    """A number below n. Only rng.random() is the same in every version of Python, so every draw uses it."""
    return int(rng.random() * n)


def lay_out(rows: Iterable[Row], length: int) -> tuple[bytes, bytes]:
    """Rows as the bytes of a .bin file, and the groups of its tokens; one more BOS is the target of the last row."""
    tokens, marks = [], []
    for row, groups in rows:
        tokens += row + [EOS] * (length - len(row))
        marks += groups + [0] * (length - len(row))
    return np.array([*tokens, BOS], dtype=np.uint16).tobytes(), bytes([*marks, 0])


def write_task(folder: Path, task: Task, made_by: dict) -> None:
    """Write a data set; keep equal files, refuse to replace different ones."""
    (train, _), (val, marks) = (lay_out(rows, task.length) for rows in (task.train, task.val))
    if min(len(train), len(val)) <= 2:
        raise ValueError(f"{folder}: expected rows for training and for validation, found none for one of them")
    names = {"groups": {str(g): name for g, name in enumerate(task.groups, 1)}} | made_by | {"length": task.length}
    files = task.files | {"answers.json": json.dumps(names, indent=1).encode() + b"\n", "val.answers.bin": marks,
                          "train.bin": train, "val.bin": val}
    missing = [name for name in files if not (folder / name).exists()]
    for name in files.keys() - missing:
        refuse_irregular(folder / name)
        if (folder / name).read_bytes() != files[name]:
            raise ValueError(f"{folder / name}: holds something else already; choose another --dataset, "
                             f"or delete {folder}")
    for name in missing:
        with atomic_write(folder / name) as f:
            f.write(files[name])
    print(f"{folder}: train with --dataset={folder.parent.name} --vocab_size={task.vocab_size} "
          f"--max_seq_len={task.length}", file=sys.stderr)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="task", required=True)

    def command(name: str, help: str, sequences: int, unit: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--data_dir", type=Path, default="data", help="folder of all data sets")
        sub.add_argument("--dataset", default=name, help="name of the data set")
        sub.add_argument("--sequences", type=between(1, 10_000_000), default=sequences, help=unit)
        sub.add_argument("--seed", type=between(0, 2**63 - 1), default=1, help="of everything that is drawn")
        return sub

    sub = command("arithmetic", "arithmetic progressions", 800, "training rows, each with its own start and step")
    sub.add_argument("--vocab_size", type=between(7, 1003), default=34, help="3 more than the modulus, 31")
    sub.add_argument("--length", type=between(5, 4096), default=16, help="tokens in a row, BOS among them")
    sub = command("induction", "stories with made-up names", 20_000, "most training stories")
    sub.add_argument("--from_dataset", default="tinystories", help="name of the data set with the stories")
    sub.add_argument("--vocab_size", type=between(BYTE_VOCAB_SIZE, 1 << 16), default=512, help="of that data set")
    sub.add_argument("--length", type=between(8, 4096), default=128, help="tokens in a row; stories are cut to it")
    sub = command("polynomial", "polynomials over F7[X]/(X^5)", 100_000, "training rows")
    sub.add_argument("--operations", type=between(1, 20), default=1, help="most operations in training")
    sub.add_argument("--beyond", type=between(0, 20), default=1, help="how many more in validation")
    sub.add_argument("--val_sequences", type=between(1, 10_000), default=200, help="for each number of operations")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = vars(parse_arguments(argv))
    name, data_dir, dataset = (args.pop(key) for key in ("task", "data_dir", "dataset"))
    made_by = {"task": name} | args
    if name == "induction":
        task = induction(data_dir / args.pop("from_dataset"), **args)
    else:
        task = {"arithmetic": arithmetic, "polynomial": polynomial}[name](**args)
    write_task(vocab_folder(data_dir / dataset, task.vocab_size), task, made_by)


if __name__ == "__main__":
    sys.exit(program(main, "interrupted; the same command starts again"))
