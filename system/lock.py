"""One program at a time in a folder: a lock that ends with its process, also after kill -9.

    with hold(out / "lock"):   # ValueError naming pid and host of the program that has it
        ...

The file says who holds it. What a killed process leaves is an unlocked file, which the next one takes.
On Windows, and on file systems without locks, nothing keeps a second program out.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from system.files import is_at, read_text, refuse_irregular
from system.shown import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def take(path: Path) -> IO | None:
    """The file `path`, locked for this process and those that inherit it, until the last has closed it or ended.

    None if another process holds it. Errors: ValueError if the file cannot be written.
    """
    refuse_irregular(path)
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{shown(path.parent)}: is a file; expected a folder, or the name of a new one")
    try:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            f = open(path, "a+")
            try:
                if fcntl:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                f.close()
                return None
            except OSError as error:
                print(f"{path}: cannot be locked ({error.strerror}); nothing keeps a second program out of "
                      f"{path.parent}", file=sys.stderr)
            if is_at(path, f):
                sign(f, os.getpid())
                return f
            f.close()  # the one before removed it as it left
    except OSError as error:
        raise ValueError(f"cannot write {shown(path)}: {error.strerror or error}") from error


def sign(f: IO, pid: int) -> None:
    """Write into a locked file which process holds it."""
    f.truncate(0)
    f.write(f"pid {pid} on {socket.gethostname()}\n")
    f.flush()


def holder(path: Path) -> tuple[str, int | None]:
    """Who holds a lock: in words, and its pid if it runs on this machine."""
    text = read_text(path, most=1000, errors="replace").strip()
    match = re.fullmatch(r"pid (\d+) on (.*)", text)
    return shown(text) or "pid not written yet", int(match[1]) if match and match[2] == socket.gethostname() else None


@contextmanager
def hold(path: Path) -> Iterator[IO]:
    """The lock for the length of a block. Errors: ValueError naming its holder if another process has it.

    A folder that did not exist before, and is empty after the block, is removed with the lock.
    """
    new = not path.parent.exists()
    f = take(path)
    if f is None:
        raise ValueError(f"{shown(path.parent)}: another program is at work here ({holder(path)[0]}); "
                         "wait for it, or choose another folder")
    with f:
        try:
            yield f
        finally:
            if is_at(path, f):
                with suppress(OSError):
                    path.unlink()  # still locked: who has opened it meanwhile finds it gone, and takes a new one
                    if new:
                        path.parent.rmdir()  # OSError: the block has put something in
