"""Runs of train.py as processes of their own: one thread each, pinned to a core, with a log to look at meanwhile.

What this leaves out on purpose: which runs there are (ablate.py, sweep.py), and other machines.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two programs from one run
    fcntl = None

METRIC = "val/ntp"  # the only number by which runs are compared
POLL = 0.5  # seconds between two looks at the logs


def free_cores() -> list[int]:
    """The cores that this process may use, by number; where they have none, 0 to as many as there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def lock(f: IO) -> bool:
    """Take an open file for this process and those that inherit it, until the last has ended; False if it is taken."""
    try:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def start(program: Path, words: list[str], folder: Path, core: int | None) -> subprocess.Popen:
    """A process with one thread, on one core, or on any. folder/stderr.txt has what it complains of.

    It holds `folder`/pid locked. One that is still at work there, because it outlived a program that was killed, is
    asked to save and stop before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "pid", "a+") as pid, open(folder / "stderr.txt", "w") as errors:
        if not lock(pid):
            print(f"{folder}: stopping its process from before", file=sys.stderr)
            pid.seek(0)
            if number := pid.read():
                with suppress(ProcessLookupError):  # ended by now
                    os.kill(int(number), signal.SIGTERM)
            while not lock(pid):
                time.sleep(POLL)
        pid.truncate(0)
        # a session of its own: Ctrl-C reaches this program alone, which asks runs to stop; asked twice they do not save
        process = subprocess.Popen([sys.executable, str(program), *words], stdout=subprocess.DEVNULL, stderr=errors,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
                                   pass_fds=[pid.fileno()] if fcntl else [])
        pid.write(str(process.pid))
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {core})
    return process


def how_to_begin(folder: Path) -> list[str]:
    """The words for train.py by which a run that was cut short goes on, and a new one begins."""
    return ["--init_from=resume"] if (folder / "last.pt").exists() else []


def stop(processes: list[subprocess.Popen]) -> None:
    """Ask them to save and end, and wait until they have."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def evaluations(folder: Path) -> dict[int, float]:
    """{iteration: val/ntp} of a log so far; a line that is half written, or broken, does not count."""
    path, found = folder / "log.jsonl", {}
    for line in path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []:
        if METRIC in line:  # few have it, and others are not worth parsing
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                values = json.loads(line)
                found[values["iter"]] = float(values[METRIC])
    return found


def settings_in(folder: Path) -> dict:
    """The settings in the first line of a run's log; none where it has none."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        with open(folder / "log.jsonl", errors="replace") as f:
            return dict(json.loads(f.readline())["config"])
    return {}


def complaint(folder: Path, code: int) -> str:
    """Why a process failed, in its own words."""
    lines = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
    said = [line for line in lines if line.startswith("train.py: ")] or lines or [f"exit code {code}, without a word"]
    return said[-1]
