"""What the machine has, read from the operating system."""

import sys
from pathlib import Path

import psutil

from core.units import GIB

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_SMALLEST_MARGIN_BYTES = 2 * GIB


def machine_memory_bytes(cgroup_limits: tuple[Path, ...] = _CGROUP_LIMITS) -> int:
    """Return the RAM this process may use: the machine's, or its cgroup's where that is less."""
    total = int(psutil.virtual_memory().total)
    if sys.platform != "linux":
        return total
    for path in cgroup_limits:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        # cgroup v2 writes `max` for no limit, v1 a number near 2^63.
        if text.isdigit():
            total = min(total, int(text))
    return total


def memory_budget_bytes(total_bytes: int) -> int:
    """Return what models may use of `total_bytes`: the rest stays for the system and for us.

    On a Mac Metal recommends a working set of about three quarters of the unified memory
    (Source: MTLDevice.recommendedMaxWorkingSetSize).
    """
    share = 0.75 if sys.platform == "darwin" else 0.85
    return max(
        min(int(total_bytes * share), total_bytes - _SMALLEST_MARGIN_BYTES), total_bytes // 4
    )
