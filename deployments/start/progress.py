"""Decides whether a server that starts makes progress, however slow its machine is."""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from core.units import MIB
from deployments.start.readiness import Readiness

_IDLE_LIMIT_S = 180.0
# A process that computes may be importing or reading files, but not for ever.
_BUSY_LIMIT_S = 1200.0
# Ray's own processes use a few percent while they wait.
_BUSY_SHARE = 0.2
_LEAST_GROWTH_BYTES = 8 * MIB
_LOOK_INTERVAL_S = 2.0
# More between two looks means that this process itself was stopped or the machine slept.
_LONGEST_STEP_S = 10.0
_MAX_KINDS = 10_000
# Ids and figures: a warning that is repeated with another one is no progress.
_VARYING = re.compile(r"[0-9a-f]*[0-9][0-9a-f]*")


@dataclass(frozen=True, slots=True)
class Signs:
    """What can be seen of a starting server.

    `memory_bytes` is resident memory of all its processes; `cpu_s` the processor seconds that each
    has used, by process id.
    """

    answer: Readiness = Readiness.SILENT
    log: str = ""
    memory_bytes: int = 0
    cpu_s: Mapping[int, float] = field(default_factory=dict)


def signs_of(processes: Iterable[psutil.Process], answer: Readiness, log: str) -> Signs:
    """Return the signs of a server with these processes; those that have ended are left out."""
    memory_bytes = 0
    cpu_s: dict[int, float] = {}
    for process in processes:
        with suppress(psutil.Error):
            used = process.cpu_times()
            memory_bytes += process.memory_info().rss
            cpu_s[process.pid] = used.user + used.system
    return Signs(answer, log, memory_bytes, cpu_s)


class StartProgress:
    """Gives a start up when nothing new has happened for three minutes, or twenty if it computes.

    New is a kind of line in the log, an answer of `/readyz`, more processes or more memory than
    ever before.  Time in which this process did not run does not count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._cpu_s: Mapping[int, float] = {}
        self._answers: set[Readiness] = set()
        self._kinds: set[str] = set()
        self._most_processes = 0
        self._most_memory = 0
        self._idle_s = 0.0
        self._unchanged_s = 0.0

    def is_due(self) -> bool:
        """Return whether the last look was two seconds ago."""
        return self._clock() - self._looked_at >= _LOOK_INTERVAL_S

    def note(self, signs: Signs) -> str:
        """Record a look; return why the start must be given up, or an empty string."""
        now = self._clock()
        passed_s = now - self._looked_at
        is_busy = self._is_busy(signs.cpu_s, passed_s)
        self._looked_at, self._cpu_s = now, signs.cpu_s
        if self._is_new(signs):
            self._idle_s = self._unchanged_s = 0.0
            return ""
        counted_s = min(passed_s, _LONGEST_STEP_S)
        self._idle_s = 0.0 if is_busy else self._idle_s + counted_s
        self._unchanged_s += counted_s
        if self._idle_s >= _IDLE_LIMIT_S:
            return f"The server has made no progress for {self._unchanged_s:.0f} s."
        if self._unchanged_s >= _BUSY_LIMIT_S:
            return f"The server computes, but nothing has changed for {self._unchanged_s:.0f} s."
        return ""

    def _is_busy(self, cpu_s: Mapping[int, float], passed_s: float) -> bool:
        used_s = (used - self._cpu_s[pid] for pid, used in cpu_s.items() if pid in self._cpu_s)
        return max(used_s, default=0.0) > _BUSY_SHARE * passed_s

    def _is_new(self, signs: Signs) -> bool:
        known = len(self._answers), len(self._kinds), self._most_processes, self._most_memory
        self._answers.add(signs.answer)
        if len(self._kinds) < _MAX_KINDS:
            self._kinds.update(_VARYING.sub("0", line) for line in signs.log.splitlines())
        self._most_processes = max(self._most_processes, len(signs.cpu_s))
        if signs.memory_bytes >= self._most_memory + _LEAST_GROWTH_BYTES:
            self._most_memory = signs.memory_bytes
        return known != (
            len(self._answers), len(self._kinds), self._most_processes, self._most_memory
        )  # fmt: skip
