"""The scheduler over stand-in replicas: one load each, room made, nothing lost in between."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import InsufficientMemory, ModelNotFound
from core.settings import Settings
from core.units import MIB
from deployments.orders import LoadOrder, ReplicaReport, Residency
from deployments.scheduler import SchedulerReplica
from tests.gguf_files import llama_gguf
from tests.unit.deployments.handles import FakeHandle


class Replica:
    """A format replica that holds names instead of weights; unloading waits for the gate."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.handle = FakeHandle(
            load_model=self.load,
            unload_model=self.unload,
            report=self.report,
            residencies=self.residencies,
        )

    async def load(self, order: LoadOrder) -> Residency:
        await asyncio.sleep(0)
        self.held.append(order.model_id)
        return Residency(order.model_id, "gguf", "replica", "node", 2048, 0.1)

    async def unload(self, model_id: str) -> bool:
        await self.gate.wait()
        self.held.remove(model_id)
        return True

    async def report(self) -> ReplicaReport:
        return ReplicaReport("gguf", 1, ())

    async def residencies(self) -> list[Residency]:
        return []


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.fixture
async def scheduler(tmp_path: Path, replica: Replica) -> AsyncIterator[SchedulerReplica]:
    (tmp_path / "models").mkdir()
    for name in ("a", "b"):
        llama_gguf(tmp_path / "models" / f"{name}-F32.gguf")
    settings = Settings(
        home=tmp_path, starters=False, formats=["gguf"], memory_budget=70 * MIB, threads=1
    )
    handles: Any = {"gguf": replica.handle}
    scheduler = SchedulerReplica(settings, handles)
    while not await scheduler.is_ready():
        await asyncio.sleep(0.005)
    yield scheduler
    replica.gate.set()
    scheduler.__del__()
    await asyncio.gather(scheduler._background, return_exceptions=True)


A, B = "a@gguf-f32", "b@gguf-f32"


async def test_requests_for_one_cold_model_load_it_once(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    found = await asyncio.gather(*(scheduler.ensure_loaded(A) for _ in range(5)))
    assert len({id(residency) for residency in found}) == 1
    assert len(replica.handle.load_model.calls) == 1


async def test_a_lost_model_is_loaded_again(scheduler: SchedulerReplica, replica: Replica) -> None:
    await scheduler.ensure_loaded(A)
    await scheduler.ensure_loaded(A, "replica")
    assert len(replica.handle.load_model.calls) == 2


async def test_the_idle_model_makes_room(scheduler: SchedulerReplica, replica: Replica) -> None:
    await scheduler.ensure_loaded(A)
    await scheduler.ensure_loaded(B)
    assert replica.held == [B]


async def test_a_model_asked_for_while_it_drains_is_loaded_after(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    replica.gate.clear()
    other = asyncio.ensure_future(scheduler.ensure_loaded(B))
    while not replica.handle.unload_model.calls:
        await asyncio.sleep(0)
    again = asyncio.ensure_future(scheduler.ensure_loaded(A, "replica"))
    await asyncio.sleep(0)
    replica.gate.set()
    residencies: list[Any] = [await other, await again]
    assert [residency.model_id for residency in residencies] == [B, A]
    assert replica.held == [A]


async def test_unknown_and_too_large_models_are_refused(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    del replica
    assert isinstance(await scheduler.ensure_loaded("nobody"), ModelNotFound)
    scheduler._options = scheduler._options.__class__(memory_limit_bytes=MIB)
    assert isinstance(await scheduler.ensure_loaded(A), InsufficientMemory)
