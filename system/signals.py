"""Signals that end a program: at once while it loads, as an exception in its main, after the step in a training run.

A second signal of any kind ends the program at once. Signals that it was started to ignore stay ignored (nohup).
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: two


class Ended(KeyboardInterrupt):
    """One of these signals has come. A KeyboardInterrupt, so whatever tidies up after Ctrl-C does so here."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def set_handler(handler: Callable | signal.Handlers) -> None:
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def raise_ended(number: int, frame) -> None:
    """A handler."""
    set_handler(signal.SIG_DFL)
    raise Ended(number)


@contextmanager
def handlers_restored() -> Iterator[None]:
    """After this block, signals are handled as before it."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """Signals no longer raise: the first sets `signal`, for a loop that ends when it is safe."""

    def __init__(self, reply: str = ""):
        """reply: for standard error, once a signal has come."""
        self.signal, self.reply = 0, reply
        set_handler(self._hear)

    def _hear(self, number: int, frame) -> None:
        set_handler(signal.SIG_DFL)
        self.signal = number
        with suppress(OSError):  # os.write, not print, which the signal may have interrupted; OSError: no terminal left
            os.write(2, self.reply.encode())
