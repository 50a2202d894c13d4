"""What the command lines of all programs share."""

import argparse
import os
import sys
from typing import NoReturn


def positive(text: str) -> int:
    """argparse's type for an integer that is at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 up, found {text!r}")
    return int(text)


def give_up_stdout(complaint: str, error: OSError) -> NoReturn:
    """End a program that could not write to standard output: exit code 1; quietly if its reader is gone (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain once more at its own end
    sys.exit(1 if isinstance(error, BrokenPipeError) else f"{complaint}: {error.strerror or error}")
