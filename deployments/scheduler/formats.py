"""The processes that hold models: asked what they do, and told apart from those that are gone."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from backends.base import Backend
from core.errors import ImpetusError
from deployments.messages import (
    NO_NODE,
    Freed,
    LoadRequest,
    NodeMemory,
    ProcessReport,
    ReplicaReport,
    Residency,
    ResidentReport,
)
from deployments.serve.handles import Handle, call
from deployments.stderr_tail import read_stderr_tail

logger = logging.getLogger(__name__)

_REPORT_LIMIT_S = 2.0

# What replicas said of models, None where the model's replica does not hold it; and of themselves.
Reported = tuple[Sequence[tuple[Residency, ResidentReport | None]], Sequence[ProcessReport]]


class FormatClients:
    """The format deployments as the scheduler sees them.  Belongs to one event loop."""

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
        self._of_format: dict[str, tuple[ProcessReport, ...]] = {}
        # Formats whose processes hold memory without models, as far as the ledger was told.
        self._keeping: set[str] = set()
        self._ended: list[ProcessReport] = []

    async def open(self, order: LoadRequest) -> Residency:
        """Let a replica open the model.  Raises what the replica does, ReplicaDied too."""
        residency: Residency = await call(self._formats[order.info.format].load_model.remote(order))
        return residency

    async def close(self, residency: Residency) -> Freed:
        """Let the replica free the model after its last request."""
        unload = self._formats[residency.format].unload_model
        freed: Freed | None = await call(unload.remote(residency.model_id))
        if freed is None:
            return Freed()
        if freed.kept_bytes:
            self._keeping.add(residency.format)
        return freed

    async def processes(self, name: str) -> Sequence[ProcessReport]:
        """Return the processes of a format; none where it does not run or answer in time."""
        if await self._is_stopped(name):
            return ()
        answer = await self._ask(name)
        return () if answer is None else answer.processes

    async def node(self, name: str) -> NodeMemory:
        """Return the machine of a format's replica; unknown where it does not run or answer."""
        known = await self.processes(name)
        return known[0].node if known else NO_NODE

    async def is_held(self, residency: Residency) -> bool:
        """Whether the replica still says that it holds the model; False where it says nothing."""
        try:
            held = await self.held(residency.format)
        except ImpetusError as problem:
            logger.warning("%s does not say what it holds: %s", residency.format, problem)
            return False
        return (residency.model_id, residency.replica_id) in {
            (one.model_id, one.replica_id) for one in held
        }

    async def held(self, name: str) -> list[Residency]:
        """Return what a format's replicas hold, nothing where it is scaled to zero."""
        if await self._is_stopped(name):
            return []
        held: list[Residency] = await call(self._formats[name].residencies.remote())
        return held

    async def _is_stopped(self, name: str) -> bool:
        """Whether asking the format would start it."""
        return self._backends[name].starts_on_demand and name not in await self._running()

    async def report(self, known: Sequence[Residency]) -> Reported:
        """Ask the replicas of these models, and those that keep memory without any.

        Those that do not answer in time are left out.
        """
        stopped = await self.stopped(known)
        asked = [residency for residency in known if residency not in stopped]
        keeping = {name for name in self._keeping if not await self._is_stopped(name)}
        names = sorted({residency.format for residency in asked} | keeping)
        answers = await asyncio.gather(*(self._ask(name) for name in names))
        found = {
            name: answer for name, answer in zip(names, answers, strict=True) if answer is not None
        }
        models = {
            name: {report.model_id: report for report in answer.residents}
            for name, answer in found.items()
        }
        of_models = [
            *((residency, None) for residency in stopped),
            *(
                (residency, models[residency.format].get(residency.model_id))
                for residency in asked
                if residency.format in models
            ),
        ]
        for name, answer in found.items():
            if any(process.kept_bytes for process in answer.processes):
                self._keeping.add(name)
            else:
                self._keeping.discard(name)
        ended, self._ended = self._ended, []
        return of_models, [*(one for each in found.values() for one in each.processes), *ended]

    async def _ask(self, name: str) -> ReplicaReport | None:
        try:
            async with asyncio.timeout(_REPORT_LIMIT_S):
                report: ReplicaReport = await call(self._formats[name].report.remote())
        except (TimeoutError, ImpetusError) as problem:
            logger.warning("%s does not say what it does: %r", name, problem)
            return None
        # Those that are gone keep nothing any more.
        now = {process.replica_id for process in report.processes}
        gone = [one for one in self._of_format.get(name, ()) if one.replica_id not in now]
        self._of_format[name] = report.processes
        for process in report.processes:
            self._processes[process.replica_id] = process
        self._ended += [replace(process, kept_bytes=0) for process in gone]
        return report

    async def stopped(self, known: Sequence[Residency]) -> list[Residency]:
        """Return what formats held that were scaled to zero meanwhile."""
        on_demand = [one for one in known if self._backends[one.format].starts_on_demand]
        if not on_demand:
            return []
        running = await self._running()
        return [residency for residency in on_demand if residency.format not in running]

    async def stderr_tail(self, replica_id: str) -> str:
        """Return what a process that is gone wrote last; empty where nobody knows."""
        process = self._processes.pop(replica_id, None)
        return (
            ""
            if process is None
            else await asyncio.to_thread(read_stderr_tail, process.stderr_path)
        )
