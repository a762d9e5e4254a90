"""Samples the server's use of resources and tells whether it grows."""

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from core.units import MIB
from scripts.bench_lib.processes import is_supported, tree_pss_bytes
from scripts.soak_lib.server import Metrics, Server

_TEMPORARY = Path("/tmp")
# Growth that does not count: of each figure, beside a share of its first value.
_SLACK = {
    "memory_bytes": 96 * MIB,
    "descriptors": 60,
    "threads": 40,
    "processes": 3,
    "files": 20,
    "temporary_bytes": 64 * MIB,
    "tasks": 60,
}
_SHARE = 0.10
_FEWEST = 6


@dataclass(frozen=True, slots=True)
class Sample:
    """Resources of all processes together at one time (monotonic seconds).

    `memory_bytes` divides shared pages among their users where the system tells (Linux), else it
    adds resident sizes.  `files` counts the home's files without cached prefixes, whose bytes have
    a limit of their own, and our folders for sockets; `temporary_bytes` has these and Ray's.
    `tasks` are those of the event loops of the router, the scheduler and the formats.
    """

    at: float
    memory_bytes: int
    descriptors: int
    threads: int
    processes: int
    files: int
    temporary_bytes: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Trend:
    """The median of the first and of the last third of the samples of one figure."""

    name: str
    first: float
    last: float

    @property
    def is_flat(self) -> bool:
        """Whether it did not grow by more than a tenth and a constant."""
        return self.last <= self.first * (1 + _SHARE) + _SLACK[self.name]


def take_sample(server: Server, metrics: Metrics) -> Sample:
    """Return a sample; blocks for some 10 ms.  `metrics` were read just before."""
    descriptors = threads = memory = processes = 0
    for process in server.note_members():
        try:
            with process.oneshot():
                descriptors += process.num_fds()
                threads += process.num_threads()
                memory += 0 if is_supported() else process.memory_info().rss
        except psutil.Error:
            continue
        processes += 1
    assert server.process is not None
    if is_supported():
        memory = tree_pss_bytes(server.process.pid)
    return Sample(
        time.monotonic(),
        memory,
        descriptors,
        threads,
        processes,
        _files(server.home),
        _temporary_bytes(),
        int(sum(metrics.values("impetus_process_tasks").values())),
    )


def _files(home: Path) -> int:
    kept = home / "cache" / "prefixes"
    found = (one for folder in (home, *_TEMPORARY.glob("impetus-*")) for one in folder.rglob("*"))
    return sum(1 for one in found if kept not in one.parents)


def _temporary_bytes() -> int:
    total = 0
    for folder in (*_TEMPORARY.glob("impetus-*"), *_TEMPORARY.glob("ray/session_2*")):
        for one in folder.rglob("*"):
            # Files come and go while they are counted.
            with suppress(OSError):
                total += one.lstat().st_blocks * 512
    return total


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """Return the trend of each figure; none if there are too few samples."""
    if len(samples) < _FEWEST:
        return []
    third = len(samples) // 3
    return [
        Trend(
            name,
            statistics.median(asdict(one)[name] for one in samples[:third]),
            statistics.median(asdict(one)[name] for one in samples[-third:]),
        )
        for name in _SLACK
    ]
