"""Write a file whole or not at all.

A file that matters is written under a temporary name in the same folder, flushed to the disk, and
moved into place in one step (POSIX rename), so whoever looks at its name sees the old content or
the new one, never half of either: not after Ctrl-C, not after kill -9, not on a full disk.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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
