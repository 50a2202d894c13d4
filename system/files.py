"""Write a file whole or not at all.

A file that matters is written under a temporary name in the same folder, flushed to the disk, and
moved into place in one step (POSIX rename), so whoever looks at its name sees the old content or
the new one, never half of either: not after Ctrl-C, not after kill -9, not on a full disk.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def is_irregular(path: Path) -> bool:
    """Is something there that is no file: a folder, a pipe, a device?"""
    return os.path.exists(path) and not os.path.isfile(path)


def refuse_irregular(path: Path) -> None:
    """ValueError for a folder, a pipe or a device: the former cannot be a file, the others never end, or begin."""
    if is_irregular(path):
        raise ValueError(f"{path}: expected a file, found a {'folder' if os.path.isdir(path) else 'pipe or device'}")


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
    if is_irregular(path):  # root would put a file in the place of /dev/null
        raise ValueError(f"cannot write {path}: it is there, and no file")
    temporary = path.with_name(f".{path.name}.tmp")  # always the same: what kill -9 leaves, the next write replaces
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

    A folder that is there and holds nothing but `files` gives way to it. (Between the two moves that this
    takes, a kill -9 leaves it as `.<name>.old`.) Errors: ValueError if there is something else, or it cannot be
    written; whatever the block raised otherwise, and then `path` is what it was.
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
