"""Stories out of files, one at a time: text, JSON or Parquet, plain or compressed.

    for story in read_stories(Path("tales.jsonl.gz")): ...

The name of a file says what it holds, and .gz or .zst at its end that it is compressed:

    .json      a list of objects, or one object a line
    .jsonl     one object a line
    .parquet   rows
    any other  text; stories end at <|endoftext|> marks, at blank lines, or with the line

An object holds a story in `text`, `story` or a field that is named; or it is an example, which has
a prompt and an answer: `prompt` with `answer`, `completion` or `response`, or `messages` of a chat.
Files are read as streams: only a story and a block are in memory, however large the file.

.parquet and .zst need pyarrow (requirements-data.txt).
"""

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple, TextIO

from system.files import refuse_irregular
from system.shown import shown

END = "<|endoftext|>"
SEPARATORS = ("auto", "marks", "blank_lines", "lines")
COMPRESSED = (".gz", ".zst")
FORMATS = (".txt", ".json", ".jsonl", ".parquet")  # what is taken from a folder
ANSWERS = ("answer", "completion", "response")  # besides `prompt`
STORY_FIELDS = ("text", "story")
NUL_SHARE = 4  # a story of which a NUL is more than one character in so many is no UTF-8 text
BLOCK = 1 << 16  # characters of a .json file that are read at a time
LONGEST_ITEM = 1 << 26  # characters of one object in a .json list


class Turn(NamedTuple):
    """A part of an example: what is given, and what the model is to answer."""

    prompt: str
    answer: str


Story = str | list[Turn]  # a text, or an example of one turn or more


def files_of(names: Iterable[str | Path]) -> list[Path]:
    """The files that `names` stand for: files, globs, and folders (their story files, or else their token files).

    Each comes once; those of a folder or glob are sorted. Errors: ValueError for a name that stands for nothing.
    """
    found: dict[Path, None] = {}
    for name in map(Path, names):
        if name.is_dir():
            inside = sorted(p for p in name.iterdir() if p.is_file() and not p.name.startswith("."))
            paths = [p for p in inside if format_of(p)[0] in FORMATS] or [p for p in inside if p.suffix == ".bin"]
            if not paths:
                raise ValueError(f"{name}: holds no file whose name ends in {', '.join(FORMATS)} or .bin")
        elif name.exists():
            paths = [name]
        else:
            paths = sorted(map(Path, glob.glob(str(name), recursive=True)))
            if not paths:
                raise ValueError(f"{name}: no such file or folder")
        found |= dict.fromkeys(paths)
    return list(found)


def format_of(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of a.jsonl.gz; the second is empty where nothing is compressed."""
    suffixes = ["", *(suffix.lower() for suffix in path.suffixes)]
    if suffixes[-1] in COMPRESSED:
        return suffixes[-2], suffixes[-1]
    return suffixes[-1], ""


def stem_of(path: Path) -> str:
    """The name of a file without its endings: tales of tales.jsonl.gz."""
    return Path(path.stem).stem if format_of(path)[1] else path.stem


class StoryFile:
    """A file of stories; once it has been read, str() says how many and how they were separated.

    field: where objects have their text. separator: of SEPARATORS, for text files. "auto" guesses; "marks" splits at
    blank lines if there is no mark at all, as this lab's own files and TinyStories' are read.
    """

    def __init__(self, path: Path, field: str | None = None, separator: str = "marks"):
        self.path, self.field, self.separator = path, field, separator
        self.count = self.marks = 0  # stories, and marks inside of them
        self.layout = ""

    def __str__(self) -> str:
        remark = f"; {self.marks:,} {END} inside of them became spaces" if self.marks else ""
        return f"{self.path}: {self.count:,} stories, {self.layout}{remark}"

    def read(self, advance: Callable[[int], object] = lambda count: None) -> Iterator[Story]:
        """The stories and examples, without empty ones. advance: gets the number of bytes after each read.

        Errors: ValueError naming the file and the place in it if it cannot be read or holds no story.
        """
        refuse_irregular(self.path)
        self.count = self.marks = 0
        try:
            for story in self._all(advance):
                if isinstance(story, str):
                    if story.count("\0") * NUL_SHARE > len(story):
                        raise ValueError(f"{self.path}: expected UTF-8 text, found NUL bytes, as UTF-16 has them; "
                                         f"convert it: iconv -f UTF-16LE -t UTF-8 {self.path}")
                    self.marks += story.count(END)
                    # A mark inside a story would end it early once written out.
                    story = story.replace("\r\n", "\n").replace(END, " ").strip()
                if story:
                    self.count += 1
                    yield story
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x}"
            if before := error.object[max(error.start - 20, 0) : error.start]:  # none where a block begins with it
                found += f' after "{shown(before.decode("utf-8", "replace"))}"'
            raise ValueError(f"{self.path}: expected UTF-8 text, found {found}") from error
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{self.path}: cannot read: {getattr(error, 'strerror', None) or error}") from error
        if self.count == 0:
            raise ValueError(f"{self.path}: holds no story")

    def _all(self, advance) -> Iterator[Story]:
        match format_of(self.path)[0]:
            case ".parquet":
                return self._objects(parquet_rows(self.path, self.field, advance))
            case ".json":
                return self._objects(json_items(self.path, advance))
            case ".jsonl":
                return self._objects(json_lines(self.path, advance))
        return self._texts(advance)

    def _texts(self, advance) -> Iterator[str]:
        separator = self.separator
        if separator in ("auto", "marks"):
            with open_text(self.path) as lines:
                marked = separated_by_marks(lines) if separator == "auto" else any(END in line for line in lines)
            separator = "marks" if marked else "blank_lines"
        split, name = {"marks": (split_at_marks, END), "blank_lines": (split_at_blank_lines, "blank lines"),
                       "lines": (iter, "line ends")}[separator]
        self.layout = f"separated by {name}"
        with open_text(self.path, advance) as lines:
            yield from split(lines)

    def _objects(self, records: Iterable["Record"]) -> Iterator[Story]:
        """The story or example of each object; the first object decides which fields they are in."""
        fields = None
        for place, record in records:
            fields = fields or fields_of(record, self.field)
            try:
                story = story_of(record, fields)
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(f"{place}: expected {an_object(fields or (self.field,))}, "
                                 f"found {repr(record)[:60]}") from None
            self.layout = f"each in {' and '.join(fields)}"
            yield story


def read_stories(path: Path) -> Iterator[Story]:
    """The stories or examples of a file of this lab, or one like it."""
    return StoryFile(path).read()


class Counted(io.RawIOBase):
    """An open file that reports how many bytes are read from it."""

    def __init__(self, raw: io.RawIOBase, advance: Callable[[int], object]):
        self.raw, self.advance = raw, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.raw.readinto(buffer)
        self.advance(count)
        return count


@contextmanager
def open_text(path: Path, advance: Callable[[int], object] = lambda count: None) -> Iterator[TextIO]:
    """A file as UTF-8 text, decompressed, with or without a byte order mark; line ends as they are."""
    with open(path, "rb", buffering=0) as raw:
        data = io.BufferedReader(Counted(raw, advance), 1 << 20)
        match format_of(path)[1]:
            case ".gz":
                data = gzip.GzipFile(fileobj=data)
            case ".zst":
                pyarrow = import_pyarrow(path)
                data = pyarrow.CompressedInputStream(pyarrow.PythonFile(data, mode="r"), "zstd")
        yield io.TextIOWrapper(data, encoding="utf-8-sig", newline="")


def import_pyarrow(path: Path):
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path}: needs pyarrow: pip install -r requirements-data.txt") from error
    return pyarrow


# ---------------------------------------------------------------------------------------------
# text

def separated_by_marks(lines: Iterable[str]) -> bool:
    """True if <|endoftext|> marks separate the stories; one mark may be part of the text.

    They do if two lines end with one, or if there are at least half as many marks as blocks between blank lines.
    """
    marks = at_line_ends = blocks = 0
    inside = False  # a block
    for line in lines:
        bare = line.strip()
        marks += line.count(END)
        at_line_ends += bare.endswith(END)
        if at_line_ends == 2:
            return True
        is_text = bare not in ("", END)
        if is_text and not inside:
            blocks += 1
        inside = is_text
    return marks > 0 and 2 * marks >= blocks


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


# ---------------------------------------------------------------------------------------------
# objects

Record = tuple[str, object]  # its place, for messages, and the object


def json_lines(path: Path, advance) -> Iterator[Record]:
    with open_text(path, advance) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = line.strip()
                yield f"{path}:{number}", record


def json_items(path: Path, advance) -> Iterator[Record]:
    """The objects of a .json file: the items of a list, or of one object a line."""
    with open_text(path) as f:
        is_list = f.read(BLOCK).lstrip().startswith("[")
    if is_list:
        with open_text(path, advance) as f:
            yield from list_items(f, path)
    else:
        yield from json_lines(path, advance)


def list_items(f: TextIO, path: Path) -> Iterator[Record]:
    """The items of a JSON list, as long as they are objects; the list is never held as a whole."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    text, at = "", 0  # the block in memory, and the position in it

    def next_character() -> str:
        """The next one that is no space, at `at`; "" at the end of the file."""
        nonlocal text, at
        at = space.match(text, at).end()
        while at == len(text):
            text = f.read(BLOCK)
            if not text:
                return ""
            at = space.match(text).end()
        return text[at]

    next_character()
    at += 1  # the bracket
    if next_character() == "]":
        return
    for number in count(1):
        place = f"{path}: item {number}"
        record = None
        while record is None and next_character() == "{":
            try:
                record, at = decode(text, at)
            except RecursionError:
                break
            except ValueError:  # broken, or not read to its end: read as much again, so that time stays linear
                more = f.read(max(BLOCK, len(text) - at))
                if not more or len(text) - at > LONGEST_ITEM:
                    break
                text, at = text[at:] + more, 0
        yield place, text[at : at + 60] if record is None else record
        match next_character():
            case ",":
                at += 1
            case "]":
                return
            case found:
                raise ValueError(f"{place}: expected a comma or the end of the list after it, "
                                 f"found {found or 'the end of the file'!r}")


def parquet_rows(path: Path, field: str | None, advance) -> Iterator[Record]:
    """The rows of a Parquet file, only the columns that are needed, a thousand at a time."""
    pyarrow = import_pyarrow(path)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            names, rows = table.schema_arrow.names, max(table.metadata.num_rows, 1)
            fields = fields_of(dict.fromkeys(names), field)
            if fields is None:
                raise ValueError(f"{path}: expected columns {field or 'text, story, prompt and answer, or messages'}, "
                                 f"found {', '.join(names)}"[:300])
            size, number = path.stat().st_size, 0
            for batch in table.iter_batches(1000, columns=list(fields)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
                advance(size * batch.num_rows // rows)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: cannot read: {error}") from error


def fields_of(record: object, field: str | None) -> tuple[str, ...] | None:
    """The names of the fields with an object's story or example; None if it has neither."""
    if not isinstance(record, dict):
        return None
    answers = [name for name in ANSWERS if name in record]
    if field is None and "turns" in record:
        return ("turns",)  # as write_data_set has it
    if field is None and "messages" in record:
        return ("messages",)
    if field is None and "prompt" in record and answers:
        return ("prompt", answers[0])
    return next(((name,) for name in ([field] if field else STORY_FIELDS) if name in record), None)


def an_object(fields: tuple[str | None, ...]) -> str:
    """An object with these fields, for messages; (None,) stands for any that has a story."""
    if fields == (None,):
        return '{"text": ...}, {"story": ...}, {"prompt": ..., "answer": ...} or {"messages": [...]}'
    return "{" + ", ".join(f'"{name}": ...' for name in fields) + "}"


def story_of(record: dict, fields: tuple[str, ...] | None) -> Story:
    """The story or example in these fields. Errors: KeyError, TypeError, ValueError or AttributeError."""
    if fields is None:
        raise ValueError("no story")
    values = [record[name] for name in fields]
    if fields == ("messages",):
        turns = chat_turns(values[0])
    elif fields == ("turns",):
        turns = [Turn(prompt, answer) for prompt, answer in values[0]]
    elif len(fields) == 2:
        turns = [Turn(*values)]
    else:
        values[0].encode("utf-8")  # refuses half a surrogate pair, which JSON allows
        return values[0]
    for turn in turns:
        for text in turn:
            text.encode("utf-8")
    turns = [Turn(prompt, answer.strip()) for prompt, answer in turns]
    return turns if any(turn.answer for turn in turns) else []


def chat_turns(messages: list[dict]) -> list[Turn]:
    """The turns of a chat in Llama 2's template, as `run -m chat` has it. A system message goes into the first.

    >>> chat_turns([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
    [Turn(prompt='[INST] Hi [/INST]', answer='Hello!')]
    """
    messages = [(m["role"], m["content"]) for m in messages]
    system = ""
    if messages and messages[0][0] == "system":
        system = f"<<SYS>>\n{messages.pop(0)[1]}\n<</SYS>>\n\n"
    roles = [role for role, _ in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("expected user and assistant in turns")
    turns = []
    for (_, question), (_, answer) in zip(messages[::2], messages[1::2], strict=True):
        turns.append(Turn(f"[INST] {system}{question} [/INST]", answer))
        system = ""
    return turns
