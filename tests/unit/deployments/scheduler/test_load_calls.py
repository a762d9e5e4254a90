"""How many remote calls one load makes: the questions are asked once."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from core.settings import Settings
from deployments.messages import Residency, UnloadResult
from deployments.scheduler.deployment import SchedulerReplica
from tests.unit.deployments.handles import FakeMethod
from tests.unit.deployments.scheduler.scheduling import A, B, Replica, started
from tests.waiting import wait_until

_METHODS = ("load_model", "unload_model", "report", "residencies")


pytestmark = pytest.mark.usefixtures("inspection")


def calls_of(replica: Replica) -> Counter[str]:
    methods: dict[str, FakeMethod] = {name: getattr(replica.handle, name) for name in _METHODS}
    return Counter({name: len(method.calls) for name, method in methods.items()})


def still(scheduler: SchedulerReplica) -> None:
    """Stop what asks by the clock, so that only the load's own calls are counted."""
    scheduler._ledger._watch.cancel()
    scheduler._background.cancel()


async def test_a_load_that_evicts_asks_one_question(tmp_path: Path) -> None:
    replica = Replica()
    async with started(tmp_path, replica) as scheduler:
        still(scheduler)
        assert isinstance(await scheduler.ensure_loaded(A), Residency)
        before = calls_of(replica)
        assert isinstance(await scheduler.ensure_loaded(B), Residency)
        made = calls_of(replica) - before
        assert made == {"report": 1, "unload_model": 1, "load_model": 1}


async def test_a_request_for_a_model_that_is_being_loaded_asks_nothing(tmp_path: Path) -> None:
    replica = Replica()
    async with started(tmp_path, replica) as scheduler:
        still(scheduler)
        replica.may_load.clear()
        first = asyncio.ensure_future(scheduler.ensure_loaded(A))
        while not scheduler._ledger.state.is_loading(A):
            await asyncio.sleep(0)
        before = calls_of(replica)
        second = asyncio.ensure_future(scheduler.ensure_loaded(A))
        await wait_until(lambda: len(scheduler._ledger._waiting) == 2, "both wait for the load")
        replica.may_load.set()
        assert isinstance(await second, Residency)
        assert await first
        assert calls_of(replica)["report"] == before["report"]


async def test_a_load_in_a_format_that_starts_on_demand_asks_two_questions(
    tmp_path: Path,
) -> None:
    replica = Replica()
    asked = 0

    async def running() -> frozenset[str]:
        nonlocal asked
        asked += 1
        return frozenset({"echo"})

    (tmp_path / "models").mkdir()
    settings = Settings(home=tmp_path, starters=False, formats=["echo"], threads=1)
    handles: Any = {"echo": replica.handle}
    scheduler = SchedulerReplica(settings, handles, running, replica.existing)
    await scheduler.model_states()
    still(scheduler)
    # Bytes that the process keeps make it worth asking although it holds no model.
    replica.kept_bytes, replica.freed = 1, UnloadResult(2, 1, 1, is_known=True)
    for _ in range(2):
        await scheduler.ensure_loaded("echo@echo")
        await scheduler.unload("echo@echo")
    before, asked = calls_of(replica), 0
    assert isinstance(await scheduler.ensure_loaded("echo@echo"), Residency)
    assert calls_of(replica) - before == {"report": 1, "load_model": 1}
    assert asked == 1
    scheduler.__del__()
    await asyncio.gather(scheduler._background, return_exceptions=True)
