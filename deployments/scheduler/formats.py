"""Clients of the format deployments: load, unload, usage reports, detection of dead processes."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from backends.base import Backend
from core.errors import ImpetusError
from deployments.messages import (
    NO_NODE,
    LoadRequest,
    ModelUsage,
    NodeMemory,
    ProcessReport,
    ReplicaReport,
    Residency,
    UnloadResult,
)
from deployments.serve.handles import Handle, call
from deployments.stderr_tail import read_stderr_tail

logger = logging.getLogger(__name__)

_REPORT_LIMIT_S = 2.0
_KEPT_ENDED = 32


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The answers of some formats' replicas to one question.

    `asked_at`: monotonic seconds right before.  `models` has None for a model that its replica no
    longer holds.  `processes` are those that answered, by format; `ended` are gone since then and
    keep nothing.
    """

    asked_at: float = -math.inf
    models: Sequence[tuple[Residency, ModelUsage | None]] = ()
    processes: Mapping[str, Sequence[ProcessReport]] = field(default_factory=dict)
    ended: Sequence[ProcessReport] = ()

    @property
    def kept(self) -> tuple[tuple[str, int], ...]:
        """Bytes that each process keeps beside its models, by process name."""
        found = [*(one for each in self.processes.values() for one in each), *self.ended]
        return tuple((process.replica_id, process.kept_bytes) for process in found)

    def node_of(self, name: str) -> NodeMemory:
        """Return the machine of a format's first process; NO_NODE if none answered."""
        found = self.processes.get(name)
        return found[0].node if found else NO_NODE


class FormatClients:
    """Calls the format deployments' replicas.  Belongs to one event loop."""

    def __init__(
        self,
        formats: Mapping[str, Handle],
        backends: Mapping[str, Backend],
        running: Callable[[], Awaitable[frozenset[str]]],
    ) -> None:
        self._formats = formats
        self._backends = backends
        self._running = running
        self._processes: dict[str, ProcessReport] = {}
        self._processes_by_format: dict[str, Sequence[ProcessReport]] = {}
        # Formats whose processes keep memory beside their models.
        self._keeping_memory: set[str] = set()
        self._ended: list[ProcessReport] = []

    async def open(self, request: LoadRequest) -> Residency:
        """Load the model on a replica.  Raises the replica's errors and ReplicaDied."""
        handle = self._formats[request.info.format]
        residency: Residency = await call(handle.load_model.remote(request))
        return residency

    async def close(self, residency: Residency) -> UnloadResult:
        """Unload the model after its last request."""
        unload = self._formats[residency.format].unload_model
        # The process may be gone, or have loaded the model again since.
        freed: UnloadResult | None = await call(unload.remote(residency.model_id, residency))
        if freed is None:
            return UnloadResult()
        if freed.kept_bytes:
            self._keeping_memory.add(residency.format)
        return freed

    def known_processes(self, name: str) -> frozenset[str]:
        """Return the processes of a format, as of the last answer."""
        return frozenset(process.replica_id for process in self._processes_by_format.get(name, ()))

    async def lost_processes(self, name: str, known: frozenset[str]) -> frozenset[str]:
        """Ask a format for its processes; return those of `known` that are gone."""
        processes: Sequence[ProcessReport] = ()
        if not await self._stopped_among({name}):
            answer = await self._ask(name)
            processes = () if answer is None else answer.processes
        self._record_processes(name, processes)
        return known - {process.replica_id for process in processes}

    async def is_resident(self, residency: Residency) -> bool:
        """Whether the replica confirms that it holds the model; False if it does not answer."""
        try:
            held = await self.residencies(residency.format)
        except ImpetusError as problem:
            logger.warning("asking %s for its models failed: %s", residency.format, problem)
            return False
        return (residency.model_id, residency.replica_id) in {
            (one.model_id, one.replica_id) for one in held
        }

    async def residencies(self, name: str) -> list[Residency]:
        """Return the models that a format's replicas hold; none if it is scaled to zero."""
        if await self._stopped_among({name}):
            return []
        held: list[Residency] = await call(self._formats[name].residencies.remote())
        return held

    async def report(self, known: Sequence[Residency], name: str = "") -> UsageReport:
        """Ask the formats of these models and the format `name` for their usage, concurrently.

        Formats whose processes keep memory beside their models are asked as well.  Formats that
        do not answer within 2 s are left out; formats scaled to zero are not started.
        """
        asked_at = time.monotonic()
        names = {one.format for one in known} | self._keeping_memory | ({name} if name else set())
        stopped = await self._stopped_among(names)
        for one in stopped:
            self._record_processes(one, ())
        asked = sorted(names - stopped)
        answers = await asyncio.gather(*(self._ask(one) for one in asked))
        found = {
            one: answer for one, answer in zip(asked, answers, strict=True) if answer is not None
        }
        for one, answer in found.items():
            self._record_processes(one, answer.processes)
        reports = {
            (one, report.model_id): report
            for one, answer in found.items()
            for report in answer.residents
        }
        alive = {one.replica_id for answer in found.values() for one in answer.processes}
        models = [
            (
                residency,
                # Another process may have loaded the model since.
                reports.get((residency.format, residency.model_id))
                if residency.replica_id in alive
                else None,
            )
            for residency in known
            if residency.format in found or residency.format in stopped
        ]
        ended, self._ended = self._ended, []
        processes = {one: answer.processes for one, answer in found.items()}
        return UsageReport(asked_at, models, processes, ended)

    async def _stopped_among(self, names: Collection[str]) -> set[str]:
        """Return the formats that are scaled to zero: a call would start them."""
        on_demand = {name for name in names if self._backends[name].starts_on_demand}
        return on_demand - await self._running() if on_demand else set()

    def _record_processes(self, name: str, processes: Sequence[ProcessReport]) -> None:
        """Record a format's processes; those that are gone keep nothing."""
        now = {process.replica_id for process in processes}
        gone = [one for one in self._processes_by_format.get(name, ()) if one.replica_id not in now]
        self._ended += [replace(process, kept_bytes=0) for process in gone]
        self._processes_by_format[name] = processes
        self._processes.update((process.replica_id, process) for process in processes)
        # Those that are gone are kept a while for their last lines on stderr.
        ended = [one for one in self._processes if one not in self._running_processes()]
        for one in ended[:-_KEPT_ENDED]:
            del self._processes[one]
        if any(process.kept_bytes for process in processes):
            self._keeping_memory.add(name)
        else:
            self._keeping_memory.discard(name)

    def _running_processes(self) -> set[str]:
        known = self._processes_by_format.values()
        return {process.replica_id for each in known for process in each}

    async def _ask(self, name: str) -> ReplicaReport | None:
        try:
            async with asyncio.timeout(_REPORT_LIMIT_S):
                report: ReplicaReport = await call(self._formats[name].report.remote())
        except (TimeoutError, ImpetusError) as problem:
            logger.warning("asking %s for its usage failed: %r", name, problem)
            return None
        return report

    async def stopped(self, known: Sequence[Residency]) -> list[Residency]:
        """Return the models of formats that were scaled to zero since."""
        stopped = await self._stopped_among({one.format for one in known})
        return [residency for residency in known if residency.format in stopped]

    async def stderr_tail(self, replica_id: str) -> str:
        """Return the last stderr lines of a process that is gone; empty if unknown."""
        process = self._processes.pop(replica_id, None)
        return (
            ""
            if process is None
            else await asyncio.to_thread(read_stderr_tail, process.stderr_path)
        )
