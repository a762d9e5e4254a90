"""The scheduler over stand-in replicas: one load each, room made, nothing lost in between."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import EngineOptions, MemoryEstimate, ModelInfo
from backends.echo import EchoBackend
from catalog.models import BuiltIn, ModelRecord, ModelSettings
from core.errors import BrokenModel, InsufficientMemory, ModelNotFound, Unavailable
from core.settings import Settings
from core.units import GIB, MIB
from deployments.messages import LoadContext, Residency
from deployments.scheduler.deployment import SchedulerReplica
from deployments.scheduler.load_plans import LoadPlanner
from deployments.scheduler.thermal import SensorReader
from scheduler.state import LoadPlan
from scheduler.thermal import Reading
from tests.unit.deployments.scheduler.scheduling import (
    A,
    B,
    Replica,
    ensured_together,
    started,
    stop_polling,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("inspection")


async def test_f7_requests_for_one_cold_model_load_it_once(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    found = await ensured_together(scheduler, replica, A, 5)
    assert len({id(residency) for residency in found}) == 1
    assert len(replica.handle.load_model.calls) == 1


async def test_a_lost_model_is_loaded_again(scheduler: SchedulerReplica, replica: Replica) -> None:
    await scheduler.ensure_loaded(A)
    await scheduler.ensure_loaded(A, LoadContext(lost_replica="replica"))
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
    again = asyncio.ensure_future(scheduler.ensure_loaded(A, LoadContext(lost_replica="replica")))
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
    scheduler._ledger._state = replace(scheduler._ledger.state, budget_bytes=MIB)
    assert isinstance(await scheduler.ensure_loaded(A), InsufficientMemory)


async def test_what_an_idle_process_held_is_forgotten_without_starting_it(
    tmp_path: Path, replica: Replica
) -> None:
    (tmp_path / "models").mkdir()
    settings = Settings(home=tmp_path, starters=False, formats=["echo"], threads=1)
    running = {"echo"}

    async def deployments() -> frozenset[str]:
        return frozenset(running)

    handles: Any = {"echo": replica.handle}
    scheduler = SchedulerReplica(settings, handles, deployments, replica.existing)
    while not await scheduler.is_ready():
        await asyncio.sleep(0.005)
    await scheduler.ensure_loaded("echo@echo")
    assert len((await scheduler.model_states()).residencies) == 1
    asked = len(replica.handle.report.calls)
    running.clear()
    states = await scheduler.model_states()
    assert (states.residencies, states.loading) == ((), ())
    await scheduler.ensure_loaded("echo@echo")
    assert len(replica.handle.load_model.calls) == 2
    assert len(replica.handle.report.calls) == asked
    scheduler.__del__()
    await asyncio.gather(scheduler._background, return_exceptions=True)


async def test_a_request_waits_for_a_busy_model_and_then_has_its_place(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    replica.in_flight = 1
    waiting = asyncio.ensure_future(scheduler.ensure_loaded(B))
    while not scheduler._ledger.state.waiting:
        await asyncio.sleep(0)
    assert replica.held == [A]
    assert not replica.handle.unload_model.calls
    replica.in_flight = 0
    residency: Any = await waiting
    assert residency.model_id == B
    assert replica.held == [B]


async def test_f9_requests_over_the_bound_and_beyond_their_time_are_told_when_to_come_back(
    tmp_path: Path, replica: Replica
) -> None:
    async with started(tmp_path, replica, max_waiting=2) as scheduler:
        await scheduler.ensure_loaded(A)
        replica.in_flight = 1
        hasty = scheduler._settings.model_copy(update={"request_timeout_s": 2.0})
        scheduler._settings = hasty
        waiting = [asyncio.ensure_future(scheduler.ensure_loaded(B)) for _ in range(2)]
        await wait_until(lambda: len(scheduler._ledger.state.waiting) == 2, "two wait")
        answers: list[Any] = [await scheduler.ensure_loaded(B), *await asyncio.gather(*waiting)]
        by_code = sorted((answer.code, answer.retry_after_s) for answer in answers)
        assert by_code == [("queue_full", 1), ("unavailable", 1), ("unavailable", 1)]
        assert replica.held == [A]


async def test_f8_a_client_that_leaves_the_queue_loads_nothing(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    replica.in_flight = 1
    waiting = asyncio.ensure_future(scheduler.ensure_loaded(B))
    while not scheduler._ledger.state.waiting:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not scheduler._ledger.state.waiting
    assert len(replica.handle.load_model.calls) == 1


async def test_an_idle_model_is_unloaded_when_its_keep_alive_is_over(
    tmp_path: Path, replica: Replica
) -> None:
    async with started(tmp_path, replica, keep_alive_s=0) as scheduler:
        await scheduler.ensure_loaded(A)
        while replica.held:
            await asyncio.sleep(0.01)
        while scheduler._ledger.state.residents:
            await asyncio.sleep(0.01)
        states = await scheduler.model_states()
        assert (states.residencies, states.loading) == ((), ())


async def test_models_are_loaded_and_unloaded_on_demand(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    assert replica.held == [A]
    assert await scheduler.unload(A)
    assert replica.held == []
    assert not await scheduler.unload(A)


async def test_a_pinned_model_stays_and_the_other_is_refused_with_the_numbers(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    scheduler._store.change_settings(A, {"pin": True})
    await scheduler.settings_changed(A)
    await scheduler.ensure_loaded(A)
    refusal: Any = await scheduler.ensure_loaded(B)
    assert refusal.code == "insufficient_memory"
    assert "70.0 MiB" in refusal.message
    scheduler._store.change_settings(A, {"pin": None})
    await scheduler.settings_changed(A)
    await scheduler.ensure_loaded(B)
    assert replica.held == [B]


async def test_decisions_have_their_reasons(scheduler: SchedulerReplica) -> None:
    await scheduler.ensure_loaded(A)
    await scheduler.ensure_loaded(B)
    decisions = await scheduler.decisions()
    actions = [decision.action for decision in decisions]
    assert actions == [
        *(f"load {A}", f"grant {A}", f"unload {A}"),
        *(f"load {B}", f"grant {B}"),
    ]
    assert all(decision.reason for decision in decisions)
    assert decisions[2].reason.startswith(f"{B} needs ")


async def test_failures_of_a_macs_gpu_are_among_the_decisions(
    tmp_path: Path, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = "Apple's GPU driver failed."
    monkeypatch.setattr("deployments.scheduler.deployment.gpu_failures", lambda: [notice])
    async with started(tmp_path, replica) as scheduler:
        assert [decision.reason for decision in await scheduler.decisions()] == [notice]


async def test_f4_a_scheduler_that_starts_anew_knows_what_is_resident(
    tmp_path: Path, replica: Replica
) -> None:
    replica.found.append(Residency(A, "gguf", "replica", "node", 2048, 0.1))
    replica.held.append(A)
    async with started(tmp_path, replica) as first:
        # The catalog knows the model from the scan right before.
        assert [one.model_id for one in (await first.model_states()).residencies] == [A]
        size = first._ledger.state.used_bytes
        assert size > MIB
        await first.ensure_loaded(B)
        assert replica.held == [B]


async def test_an_estimate_is_corrected_by_what_the_replica_measured(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    assert scheduler._ledger.state.used_bytes > 8 * MIB
    replica.measured_bytes = 8 * MIB
    await scheduler.ensure_loaded(B)
    assert replica.held == [A, B]
    assert replica.handle.unload_model.calls == []


async def test_who_waited_for_a_load_is_told_whom_it_cost(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    first = await scheduler.ensure_loaded(A)
    assert isinstance(first, Residency)
    assert first.evicted == ()
    waited = await ensured_together(scheduler, replica, B, 2)
    assert [one.evicted for one in waited if isinstance(one, Residency)] == [(A,), (A,)]
    later = await scheduler.ensure_loaded(B)
    assert isinstance(later, Residency)
    assert later.evicted == ()
    snapshot = await scheduler.snapshot()
    assert (snapshot.loads, snapshot.evictions, snapshot.load_failures) == (2, 1, 0)
    replica.failure = BrokenModel("damaged")
    assert isinstance(await scheduler.ensure_loaded(A), BrokenModel)
    assert (await scheduler.snapshot()).load_failures == 1


class Growing(EchoBackend):
    """Estimates a byte for every token of context, at least 6,000."""

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        context = options.context_tokens or info.context_length
        return MemoryEstimate(0, max(context, 6000), 0, context, context)


def test_a_lowered_context_is_offered_only_where_the_user_did_not_fix_it(tmp_path: Path) -> None:
    info = ModelInfo("echo", "echo", "echo", "none", (), 0, 0, 16384, frozenset())
    record = ModelRecord("m", info, BuiltIn(), "mark", 0.0)
    plans = LoadPlanner(Settings(home=tmp_path), {"echo": Growing()}, EngineOptions())
    found = plans.plans(record, 70 * MIB)
    assert found == (LoadPlan(16384), LoadPlan(8192, 8192), LoadPlan(6000, 4096))
    assert plans.load_request(record, found[0], 70 * MIB).options.context_tokens is None
    assert plans.load_request(record, found[2], 70 * MIB).options.context_tokens == 4096
    fixed = replace(record, settings=ModelSettings(context_length=8192))
    assert plans.plans(fixed, 70 * MIB) == (LoadPlan(8192),)


def test_a_large_model_may_take_longer_to_load(tmp_path: Path) -> None:
    info = ModelInfo("echo", "echo", "echo", "none", (), 10 * GIB, 0, 16384, frozenset())
    record = ModelRecord("m", info, BuiltIn(), "1:7-8-9,10-11-12", 0.0)
    plans = LoadPlanner(
        Settings(home=tmp_path, load_limit_s=60), {"echo": Growing()}, EngineOptions()
    )
    request = plans.load_request(record, LoadPlan(16384), 70 * MIB)
    assert request.load_limit_s == 60 + 1024
    compiling = type("Compiling", (Growing,), {"compile_s": 1800.0})
    plans = LoadPlanner(
        Settings(home=tmp_path, load_limit_s=60), {"echo": compiling()}, EngineOptions()
    )
    assert plans.load_request(record, LoadPlan(16384), 70 * MIB).load_limit_s == 60 + 1024 + 1800
    assert request.signatures == ("7-8-9", "10-11-12")


async def test_f15_under_strain_nothing_new_is_loaded(tmp_path: Path, replica: Replica) -> None:
    state = tmp_path / "thermal"
    state.write_text("nominal")
    async with started(tmp_path, replica, thermal_file=state) as scheduler:
        assert isinstance(await scheduler.ensure_loaded(A), Residency)
        await stop_polling(scheduler)
        state.write_text("critical")
        # A state has to hold for a while before it counts.
        while scheduler._thermal.admits:
            scheduler._thermal._clock = lambda: time.monotonic() + 3600
            await scheduler._thermal.poll()
            scheduler._thermal._clock = lambda: time.monotonic() + 7200
            await scheduler._thermal.poll()
        while replica.held:
            await asyncio.sleep(0.005)
        refused = await scheduler.ensure_loaded(B)
        assert isinstance(refused, Unavailable)
        assert refused.retry_after_s
        assert replica.limits[-1].max_sequences == 0


@pytest.mark.parametrize(("budget", "ceiling"), [(None, 50 * MIB), (70 * MIB, None)])
async def test_other_applications_limit_loads_unless_the_user_set_a_budget(
    budget: int | None, ceiling: int | None, tmp_path: Path, replica: Replica
) -> None:
    class Sensor:
        def read(self) -> Reading:
            return Reading(available_bytes=50 * MIB)

    async with started(tmp_path, replica) as scheduler:
        scheduler._settings = scheduler._settings.model_copy(update={"memory_budget": budget})
        scheduler._thermal._reader = SensorReader(Sensor(), 5.0)
        await scheduler._thermal.poll()
        assert scheduler._ledger.state.ceiling_bytes == ceiling
