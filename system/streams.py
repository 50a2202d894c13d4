"""Standard output and error of a program that goes on without them, as a training run does."""

import os
import sys
from typing import TextIO


def open_standard_streams() -> None:
    """Put /dev/null where a standard stream was closed (`2>&-`), before an opened file takes its number.

    Nothing can be written to that standard output, so a program that is there to print still fails.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)  # takes the lowest free number: this one
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def silence(stream: TextIO) -> None:
    """Let go what this stream could not write, and what will be written to it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard output or another stream. One that cannot be written is silenced, with a note."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        silence(stream)
        if stream is not sys.stderr:
            tell(f"standard output: {error.strerror}; going on without it", sys.stderr)
