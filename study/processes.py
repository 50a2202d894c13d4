"""Runs of train.py as separate processes: one thread each, pinned to a core, followed by their logs.

What this leaves out on purpose: which runs there are (ablate.py, sweep.py), and other machines.
"""

import operator
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from settings import with_names_of_today
from system.files import open_regular, parse_json, read_text
from system.lock import holder, sign, take
from system.shown import shown_message

METRIC = "val/ntp"  # the only number by which runs are compared
POLL = 0.5  # seconds between reads of the logs


def free_cores() -> list[int]:
    """The numbers of the cores that this process may use; of all cores where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def start(program: Path, words: list[str], folder: Path, core: int | None) -> subprocess.Popen:
    """Start a program with one thread, on one core or on any; folder/stderr.txt gets its errors.

    It holds folder/pid locked. A process that still runs there, because the program that started it was killed,
    is asked to save and stop first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pid"
    lock = take(path)
    if not lock:
        who, pid = holder(path)
        print(f"{folder}: stopping its process from before ({who})", file=sys.stderr)
        if pid:
            with suppress(ProcessLookupError):  # ended by now
                os.kill(pid, signal.SIGTERM)
        while not (lock := take(path)):
            time.sleep(POLL)
    with lock, open(folder / "stderr.txt", "w") as errors:
        # a new session: Ctrl-C reaches only this program, which asks its runs to stop; asked twice they do not save
        process = subprocess.Popen([sys.executable, str(program), *words], stdout=subprocess.DEVNULL, stderr=errors,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
                                   pass_fds=[lock.fileno()] if os.name == "posix" else [])
        sign(lock, process.pid)
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {core})
    return process


def how_to_begin(folder: Path) -> list[str]:
    """Arguments for train.py that continue a run that was cut short; none for a new run."""
    return ["--init_from=resume"] if (folder / "last.pt").exists() else []


def stop(processes: list[subprocess.Popen]) -> None:
    """Ask processes to save and end, and wait for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def evaluations(folder: Path) -> dict[int, float]:
    """{iteration: val/ntp} of a log so far. Lines that are half written or broken do not count."""
    path, found = folder / "log.jsonl", {}
    for line in read_text(path, errors="replace").split("\n")[:-1] if path.exists() else []:
        if METRIC in line:  # few lines have it, the others are not worth parsing
            with suppress(ValueError, KeyError, TypeError, OverflowError):
                values = parse_json(line)
                found[operator.index(values["iter"])] = float(values[METRIC])
    return found


def settings_in(folder: Path) -> dict:
    """The settings in the first line of a run's log; none where it has none."""
    with suppress(ValueError, KeyError, TypeError):
        with open_regular(folder / "log.jsonl", "r", errors="replace") as f:
            return with_names_of_today(dict(parse_json(f.readline())["config"]))
    return {}


def complaint(folder: Path, code: int) -> str:
    """Why a process failed: the last message that it printed, with the lines that belong to it."""
    lines = read_text(folder / "stderr.txt", errors="replace").strip().splitlines()
    if not lines:
        return f"exit code {code}, no message"
    starts = [i for i, line in enumerate(lines) if line.startswith("train.py: ")]
    return shown_message("\n".join(lines[starts[-1] if starts else -1 :]))
