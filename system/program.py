"""What the command lines of all programs share.

Programs import this file before anything else (pyproject.toml has ruff hold that), so that a Python without
the libraries ends in one line, not in a traceback.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from system.shown import shown_message
from system.signals import Ended, handlers_restored, raise_ended, set_handler
from system.streams import open_standard_streams, silence, tell

ROOT = Path(__file__).resolve().parent.parent


def explain(kind: type, error: BaseException, traceback) -> None:
    """sys.excepthook: one line for a library that is missing, or cannot load on this machine."""
    name = Path(sys.argv[0]).name
    if issubclass(kind, ModuleNotFoundError):
        print(f"{name}: {sys.executable} has no {error.name}; run `make .venv/ready`, then "
              "`source .venv/bin/activate`", file=sys.stderr)
    elif issubclass(kind, OSError):  # no temporary folder
        print(f"{name}: {shown_message(error.strerror or error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def begin() -> None:
    """Prepare for the seconds in which libraries load: no traceback of theirs, and no file in a stream's place."""
    sys.excepthook = explain
    open_standard_streams()
    set_handler(signal.SIG_DFL)  # Ctrl-C ends the program at once
    try:
        os.getcwd()
    except OSError:
        sys.exit(f"{Path(sys.argv[0]).name}: the working directory was removed; cd to another one")


if Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "bench"):  # one of our programs, no test or notebook
    begin()


def program(main: Callable[[list[str]], int | None], interrupted: str = "interrupted") -> int:
    """Run a program's main(argv) and return its exit code; an error that a user can cause is one line on stderr.

    interrupted: what Ctrl-C, SIGTERM or SIGHUP leaves behind, and how to go on.

        if __name__ == "__main__":
            sys.exit(program(main))
    """
    name = Path(sys.argv[0]).name
    with handlers_restored():  # at the end a signal ends the program: an exception would be a library's traceback
        set_handler(raise_ended)
        try:
            status = main(sys.argv[1:])
            sys.stdout.flush()  # here, where a failure can still be reported
            return status or 0
        except ValueError as error:
            message, status = error, 1
        except ModuleNotFoundError as error:
            message, status = f"needs {error.name}: pip install -r requirements-compare.txt", 1
        except MemoryError:
            message, status = "out of memory", 1
        except Ended as error:
            message, status = interrupted, 128 + error.number
        except OSError as error:
            if error.filename is None:  # files are named where they are read and written; this is standard output
                give_up_stdout(f"{name}: cannot write", error)
            message, status = f"{error.filename}: {error.strerror}", 1
        tell(f"{name}: {shown_message(message)}", sys.stderr)
        return status


def positive(text: str) -> int:
    """argparse's type for an integer that is at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 up, found {text!r}")
    return int(text)


def between(low: int, high: int) -> Callable[[str], int]:
    """argparse's type for an integer from `low` to `high`."""

    def number(text: str) -> int:
        # int() refuses thousands of digits only after a second, with a message as long
        value = int(text) if re.fullmatch(r"-?\d{1,20}", text) else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, found {text[:40]}")
        return value

    return number


def give_up_stdout(complaint: str, error: OSError) -> NoReturn:
    """End a program that could not write to standard output: exit code 1; quietly if its reader is gone (`| head`)."""
    silence(sys.stdout)  # Python would complain once more at its own end
    sys.exit(1 if isinstance(error, BrokenPipeError) else f"{complaint}: {error.strerror or error}")
