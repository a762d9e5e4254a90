"""A scheduler over stand-in replicas, and its models."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from backends.base import EngineLoad
from backends.limits import EngineLimits
from backends.registry import backends_for
from catalog.scan.identify import Outcome, examine
from core.errors import Unavailable
from core.settings import Settings
from core.units import MIB
from deployments.activity import DeathCause
from deployments.messages import (
    LoadRequest,
    ModelUsage,
    ProcessReport,
    ReplicaReport,
    Residency,
    UnloadResult,
)
from deployments.scheduler.deployment import SchedulerReplica
from deployments.serve.handles import ReplicaDied
from tests.gguf_files import llama_gguf
from tests.unit.deployments.handles import FakeHandle
from tests.waiting import wait_until

A, B = "a@gguf-f32", "b@gguf-f32"


class Replica:
    """A format replica that holds names instead of weights; unloading waits for the gate."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.found: list[Residency] = []
        self.in_flight = 0
        self.measured_bytes = 0
        self.kept_bytes = 0
        self.stderr_path = ""
        self.name = "replica"
        self.listed: frozenset[str] | None = None
        self.causes: dict[str, DeathCause] = {}
        self.freed = UnloadResult()
        self.failure: Exception | None = None
        self.limits: list[EngineLimits] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.handle = FakeHandle(
            load_model=self.load,
            unload_model=self.unload,
            report=self.report,
            residencies=self.residencies,
            set_limits=self.set_limits,
        )

    async def load(self, order: LoadRequest) -> Residency:
        await self.may_load.wait()
        await asyncio.sleep(0)
        if isinstance(self.failure, ReplicaDied):
            # Another process takes its place.
            self.name += "'"
        if self.failure is not None:
            raise self.failure
        self.held.append(order.model_id)
        return Residency(order.model_id, order.info.format, self.name, "node", 2048, 0.1)

    async def unload(self, model_id: str, residency: Residency) -> UnloadResult | None:
        assert residency.model_id == model_id
        await self.gate.wait()
        if model_id not in self.held:
            return None
        self.held.remove(model_id)
        return self.freed

    async def report(self) -> ReplicaReport:
        reports = [
            ModelUsage(model_id, 0.0, self.in_flight, EngineLoad(), self.measured_bytes)
            for model_id in self.held
        ]
        process = ProcessReport(self.name, self.kept_bytes, self.stderr_path)
        return ReplicaReport("gguf", 1, tuple(reports), (process,))

    async def residencies(self) -> list[Residency]:
        return self.found

    async def cause(self, replica_id: str) -> DeathCause | None:
        """Return what a process left in its record."""
        return self.causes.get(replica_id)

    async def existing(self) -> frozenset[str]:
        """Return what Serve lists."""
        if self.listed is None:
            raise Unavailable("Serve's controller does not answer.")
        return self.listed

    async def set_limits(self, limits: EngineLimits) -> None:
        self.limits.append(limits)


class InProcess:
    """Inspects in this process: starting the limited one takes longer than these tests."""

    def __init__(self, formats: list[str]) -> None:
        self._backends = backends_for(formats).values()

    def examine(self, path: Path) -> Outcome:
        return examine(path, self._backends)

    def close(self) -> None:
        pass


async def gguf_runs() -> frozenset[str]:
    return frozenset({"gguf"})


@asynccontextmanager
async def started(
    home: Path, replica: Replica, **options: Any
) -> AsyncGenerator[SchedulerReplica, None]:
    (home / "models").mkdir()
    for name in ("a", "b"):
        llama_gguf(home / "models" / f"{name}-F32.gguf")
    settings = Settings(
        home=home, starters=False, formats=["gguf"], memory_budget=70 * MIB, threads=1, **options
    )
    handles: Any = {"gguf": replica.handle}
    scheduler = SchedulerReplica(settings, handles, gguf_runs, replica.existing)
    while not await scheduler.is_ready():
        await asyncio.sleep(0.005)
    records: Any = replica
    scheduler._deaths._records = records
    try:
        yield scheduler
    finally:
        replica.gate.set()
        replica.may_load.set()
        scheduler.__del__()
        await asyncio.gather(scheduler._background, return_exceptions=True)


async def ensured_together(
    scheduler: SchedulerReplica, replica: Replica, model_id: str, count: int
) -> list[Any]:
    """Return the answers to requests for a model whose load goes on once all of them wait for it.

    What a request does before that takes threads, so the others might come after the load.
    """
    replica.may_load.clear()
    tasks = [asyncio.ensure_future(scheduler.ensure_loaded(model_id)) for _ in range(count)]
    await wait_until(lambda: len(scheduler._ledger._waiting) == count, "all of them wait")
    replica.may_load.set()
    return await asyncio.gather(*tasks)


async def stop_polling(scheduler: SchedulerReplica) -> None:
    """End what the scheduler does by the clock: a poll of its own would undo a test's heat."""
    scheduler._background.cancel()
    await asyncio.gather(scheduler._background, return_exceptions=True)
