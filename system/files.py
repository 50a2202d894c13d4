"""Read regular files only; write a file whole or not at all.

A file that matters is written under a temporary name in the same folder, flushed to the disk, and
moved into place in one step (POSIX rename). A reader sees the old content or the new, never half of
either: not after Ctrl-C, not after kill -9, not on a full disk.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from system.shown import shown


def is_irregular(path: str | Path) -> bool:
    """True for a path that exists and is a folder, a pipe or a device."""
    return os.path.exists(path) and not os.path.isfile(path)


def refuse_irregular(path: str | Path) -> None:
    """ValueError for a folder, a pipe or a device. Opening a pipe can block forever; a device may never end."""
    if is_irregular(path):
        kind = "folder" if os.path.isdir(path) else "pipe or device"
        raise ValueError(f"{shown(path)}: expected a file, found a {kind}")


def open_regular(path: str | Path, mode: str = "rb", **open_options) -> IO:
    """open() that reads regular files only. Errors: ValueError naming the file."""
    refuse_irregular(path)
    try:
        return open(path, mode, **open_options)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"{shown(path)}: cannot read: {getattr(error, 'strerror', None) or error}") from error


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """The content of a regular file of at most `most` bytes. Errors: ValueError naming the file."""
    with open_regular(path) as f:
        try:
            content = f.read() if most is None else f.read(most + 1)
        except OSError as error:
            raise ValueError(f"{shown(path)}: cannot read: {error.strerror or error}") from error
    if most is not None and len(content) > most:
        raise ValueError(f"{shown(path)}: expected at most {most:,} bytes, found more")
    return content


def read_text(path: str | Path, most: int | None = None, errors: str = "strict") -> str:
    """The same as UTF-8 text. errors: "strict" refuses other bytes by line; "replace" shows them as U+FFFD."""
    content = read_bytes(path, most)
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x}"
        raise ValueError(f"{shown(path)}, line {line}: expected UTF-8, found {found}") from None


def parse_json(text: str | bytes) -> Any:
    """json.loads with one kind of error: ValueError, also for [[[[[... beyond Python's recursion limit."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | Path, most: int | None = None) -> Any:
    """The JSON in a regular file. Errors: ValueError naming the file."""
    text = read_text(path, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{shown(path)}: expected JSON: {error}") from error


def fingerprint(path: str | Path) -> str:
    """Size and CRC-32 of a file. Of a big one the CRC covers 16 MiB spread over it, and so takes milliseconds."""
    block, most = 1 << 16, 256
    crc = 0
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        blocks = -(-size // block)
        for k in range(min(blocks, most)):
            f.seek(k * block if blocks <= most else k * (size - block) // (most - 1))
            crc = zlib.crc32(f.read(block), crc)
    return f"{size} bytes, crc32 {crc:08x}"


def fingerprint_of(content: bytes) -> str:
    """The same of a file with this content, of at most 16 MiB."""
    return f"{len(content)} bytes, crc32 {zlib.crc32(content):08x}"


def is_at(path: str | Path, f: IO) -> bool:
    """True while the open file `f` is what `path` names: not removed, not replaced."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(f.fileno()))
    except OSError:
        return False


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb", **open_options) -> Iterator[IO]:
    """Open a temporary file that becomes `path` when the block ends without an exception.

    Errors: ValueError naming the file if the folder or the file cannot be written (a full disk, no
    permission); whatever the block raised otherwise. Either way the temporary file is gone and
    `path` is what it was.

        with atomic_write("out/model.bin") as f:
            f.write(header)
    """
    path = Path(path)
    if is_irregular(path):  # root could replace /dev/null by a file
        raise ValueError(f"cannot write {path}: it exists and is no regular file")
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name: the next write replaces what kill -9 leaves
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, **open_options) as f:
                yield f
                f.flush()
                os.fsync(f.fileno())  # the data must be on the disk before the name is
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_folder(path: str | Path, files: Iterable[str]) -> Iterator[Path]:
    """An empty folder that becomes `path` when the block ends without an exception.

    It replaces an existing folder that holds nothing but `files`. (A kill -9 between the two moves that this
    takes leaves the old one as `.<name>.old`.) Errors: ValueError if `path` holds something else or cannot be
    written; whatever the block raised otherwise. Then `path` is what it was.
    """
    path = Path(os.path.realpath(path))
    new, old = (path.with_name(f".{path.name}.{kind}") for kind in ("tmp", "old"))
    try:
        others = sorted({p.name for p in path.iterdir()} - set(files)) if path.exists() else []
        if others:
            raise ValueError(f"cannot write {path}: it holds other files: {', '.join(others[:3])}; expected a new "
                             "folder, or one like it")
        try:
            shutil.rmtree(new, ignore_errors=True)  # what a kill left
            new.mkdir(parents=True)
            yield new
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(new, path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
