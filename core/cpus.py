"""Counts the CPUs that this process may use: affinity and the CPU quotas of its cgroups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_PROCESS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return how many logical CPUs this process may keep busy, at least 1.

    A quota of 1.5 CPUs counts as 2.  macOS has neither quotas nor affinity.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def cpu_quota(process: Path = _PROCESS, mount: Path = _MOUNT) -> float | None:
    """Return the smallest CPU quota of this process' cgroups, in CPUs; None if there is none.

    A cgroup is also limited by its ancestors.  Inside a container the mount can be the container's
    own cgroup, while `process` names a path from outside: then the mount itself is read.  Sources:
    kernel documentation, cgroup-v2 `cpu.max` and sched-bwc `cpu.cfs_quota_us`.
    """
    quotas = [quota for folder in _folders(process, mount) for quota in _quotas_of(folder)]
    return min(quotas, default=None)


def _folders(process: Path, mount: Path) -> Iterator[Path]:
    """Yield the folders of this process' cgroups for CPUs, and those of their ancestors."""
    for line in _text(process).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",")
        if not controllers:
            roots = [mount, mount / "unified"]
        elif "cpu" in names:
            roots = [mount / controllers, mount / "cpu"]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for root in roots:
            yield root
            for depth in range(len(parts)):
                yield root.joinpath(*parts[: depth + 1])


def _quotas_of(folder: Path) -> Iterator[float]:
    pairs = (
        _text(folder / "cpu.max").split(),
        [*_text(folder / "cpu.cfs_quota_us").split(), *_text(folder / "cpu.cfs_period_us").split()],
    )
    for pair in pairs:
        # "max", or -1 in version 1, means no quota.
        if len(pair) == 2 and pair[0].isdecimal() and pair[1].isdecimal() and int(pair[1]):
            yield int(pair[0]) / int(pair[1])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
