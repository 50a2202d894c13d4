"""Where a run comes from: this process, the machine's name, the commit of the code."""

import os
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def origin() -> dict:
    """host, pid, started (UTC), command; commit and dirty (does a tracked file differ from it?), None without git."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"host": socket.gethostname(), "pid": os.getpid(), "command": shlex.join(sys.orig_argv),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit, "dirty": None if changes is None else changes != ""}


def git(*words: str) -> str | None:
    """What git says of this project; None if it is no checkout, or there is no git."""
    if not (ROOT / ".git").exists():  # nor is a repository that it lies in
        return None
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, errors="replace",
                              check=True, timeout=10, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}).stdout.strip()
    return None
