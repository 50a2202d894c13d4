"""How much memory there is for this process: the machine's, or what its container may use."""

import os
from contextlib import suppress
from pathlib import Path

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # cgroup v2, v1


def machine_bytes() -> int | None:
    """Bytes of main memory, or of the container's limit if that is lower; None where the system does not say."""
    known = []
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: Windows has no sysconf
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in LIMITS:
        with suppress(OSError, ValueError):  # ValueError: "max"
            known.append(int(path.read_text()))
    return min(known, default=None)
