"""Models that fail, processes that die, memory that does not come back, strain."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import BrokenModel, ImpetusError, InsufficientMemory, ModelInUse
from core.units import GIB, MIB
from deployments.messages import (
    DEFAULT_CONTEXT,
    LoadContext,
    MemoryLease,
    Residency,
    UnloadResult,
)
from deployments.scheduler.deployment import SchedulerReplica
from deployments.serve.handles import ReplicaDied
from tests.gguf_files import llama_gguf
from tests.unit.deployments.scheduler.scheduling import (
    A,
    B,
    Replica,
    ensured_together,
    started,
    stop_polling,
)

RETRY = LoadContext(is_retry=True)


pytestmark = pytest.mark.usefixtures("inspection")


async def refusal(scheduler: SchedulerReplica, need: LoadContext = DEFAULT_CONTEXT) -> ImpetusError:
    answer: Any = await scheduler.ensure_loaded(A, need)
    assert isinstance(answer, ImpetusError)
    return answer


async def test_f12_a_load_that_fails_is_told_to_all_and_not_tried_for_every_request(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    replica.failure = BrokenModel("damaged")
    answers = await ensured_together(scheduler, replica, A, 3)
    assert [answer.code for answer in answers] == ["broken_model"] * 3
    assert scheduler._ledger.state.used_bytes == 0
    loads = len(replica.handle.load_model.calls)
    again = await refusal(scheduler)
    assert (again.status, again.code) == (503, "model_failed")
    assert "damaged" in again.message
    assert again.retry_after_s == 5
    assert len(replica.handle.load_model.calls) == loads
    assert (await scheduler.model_states()).faults[A].reason == "damaged"


async def test_f12_a_failed_model_is_tried_again_by_hand_and_after_a_while(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    replica.failure = BrokenModel("damaged")
    await refusal(scheduler)
    assert (await refusal(scheduler, RETRY)).code == "broken_model"
    replica.failure = None
    scheduler._faults._clock = lambda: time.monotonic() + 6
    assert isinstance(await scheduler.ensure_loaded(A), Residency)
    assert not (await scheduler.model_states()).faults


async def test_f12_other_files_are_another_model(
    scheduler: SchedulerReplica, replica: Replica, tmp_path: Path
) -> None:
    replica.failure = BrokenModel("damaged")
    await refusal(scheduler)
    replica.failure = None
    llama_gguf(tmp_path / "models" / "a-F32.gguf", seed=77)
    await scheduler.rescan()
    assert isinstance(await scheduler.ensure_loaded(A), Residency)


async def test_f11_three_deaths_put_a_model_into_quarantine_until_it_is_loaded_by_hand(
    scheduler: SchedulerReplica, replica: Replica, tmp_path: Path
) -> None:
    log = tmp_path / "stderr"
    log.write_text("one\n\x1b[31mGGML_ASSERT(x) failed\x1b[0m\n")
    replica.stderr_path = str(log)
    await scheduler.ensure_loaded(A)
    for number in range(3):
        died = LoadContext(lost_replica=f"replica-{number}", has_died=True)
        scheduler._format_clients._processes[died.lost_replica] = (
            await replica.report()
        ).processes[0]
        # The same death is told by every request that ran there.
        answers: list[Any] = [await scheduler.ensure_loaded(A, died) for _ in range(2)]
        await scheduler.unload(A)
    assert {answer.code for answer in answers} == {"model_quarantined"}
    assert "GGML_ASSERT(x) failed" in answers[0].message
    assert "\x1b" not in answers[0].message
    assert (await scheduler.model_states()).faults[A].is_quarantined
    assert isinstance(await scheduler.ensure_loaded(B), Residency)
    assert (await refusal(scheduler)).status == 503
    assert isinstance(await scheduler.ensure_loaded(A, RETRY), Residency)
    actions = [decision.action for decision in await scheduler.decisions()]
    assert f"quarantine {A}" in actions


async def test_f11_deaths_while_it_is_loaded_count_too(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    replica.failure = ReplicaDied("The process died.")
    for _ in range(3):
        assert (await refusal(scheduler)).code == "engine_failed"
    assert (await refusal(scheduler)).code == "model_quarantined"


async def test_f7_a_lost_model_that_did_not_die_is_not_blamed(
    scheduler: SchedulerReplica,
) -> None:
    for _ in range(5):
        assert isinstance(
            await scheduler.ensure_loaded(A, LoadContext(lost_replica="replica")), Residency
        )
    assert not (await scheduler.model_states()).faults


async def test_what_an_unload_gave_back_is_a_decision_with_both_numbers(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    replica.freed = UnloadResult(40 * MIB, 39 * MIB, 0, is_known=True)
    await scheduler.ensure_loaded(A)
    await scheduler.unload(A)
    last = (await scheduler.decisions())[-1]
    assert last.action == f"freed {A}"
    assert last.reason == "39.0 MiB of 40.0 MiB came back"
    assert scheduler._ledger.state.used_bytes == 0


async def test_memory_that_does_not_come_back_stays_in_the_ledger_until_its_process_ends(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    replica.freed = UnloadResult(40 * MIB, 8 * MIB, 32 * MIB, is_known=True)
    replica.kept_bytes = 32 * MIB
    await scheduler.ensure_loaded(A)
    await scheduler.unload(A)
    assert scheduler._ledger.state.used_bytes == 32 * MIB
    refused: Any = await scheduler.ensure_loaded(B)
    assert isinstance(refused, InsufficientMemory)
    assert "32.0 MiB by processes that did not release it" in refused.message
    replica.name, replica.kept_bytes, replica.freed = "another", 0, UnloadResult()
    await scheduler.ensure_loaded(A, LoadContext(lost_replica="replica", has_died=True))
    assert isinstance(await scheduler.ensure_loaded(B), Residency)


@pytest.mark.parametrize("is_new", [False, True], ids=["returned", "another process"])
async def test_memory_that_came_back_later_is_free_again(
    scheduler: SchedulerReplica, replica: Replica, is_new: bool
) -> None:
    replica.freed = UnloadResult(40 * MIB, 8 * MIB, 32 * MIB, is_known=True)
    replica.kept_bytes = 32 * MIB
    await scheduler.ensure_loaded(A)
    await scheduler.unload(A)
    assert isinstance(await scheduler.ensure_loaded(B), InsufficientMemory)
    replica.kept_bytes = 0
    if is_new:
        replica.name = "another"
    assert isinstance(await scheduler.ensure_loaded(B), Residency)


@asynccontextmanager
async def strained(tmp_path: Path, replica: Replica) -> AsyncGenerator[SchedulerReplica, None]:
    """Give a scheduler that holds A; `heat` below changes the machine's state at once."""
    (tmp_path / "thermal").write_text("nominal")
    async with started(tmp_path, replica, thermal_file=tmp_path / "thermal") as scheduler:
        assert isinstance(await scheduler.ensure_loaded(A), Residency)
        # The model counts as busy until its first request would have come.
        await stop_polling(scheduler)
        start = time.monotonic()
        scheduler._ledger._state = _long_granted(scheduler)
        scheduler._thermal._clock = lambda: start
        yield scheduler


def _long_granted(scheduler: SchedulerReplica) -> Any:

    state = scheduler._ledger.state
    return state.with_residents(
        [replace(one, used_at=0.0, granted_at=-1.0) for one in state.residents]
    )


async def heat(scheduler: SchedulerReplica, tmp_path: Path, state: str) -> None:
    (tmp_path / "thermal").write_text(state)
    at = scheduler._thermal._clock()
    for later in (1000.0, 2000.0):
        scheduler._thermal._clock = lambda later=later: at + later  # type: ignore[misc]
        await scheduler._thermal.poll()


async def test_f15_critical_strain_unloads_what_is_idle_and_refuses_loads(
    tmp_path: Path, replica: Replica
) -> None:
    async with strained(tmp_path, replica) as scheduler:
        await heat(scheduler, tmp_path, "critical")
        while replica.held:
            await asyncio.sleep(0.001)
        refused = await refusal(scheduler)
        assert (refused.status, refused.code) == (503, "unavailable")
        assert refused.retry_after_s
        reasons = {one.action: one.reason for one in await scheduler.decisions()}
        assert "critical strain" in reasons[f"unload {A}"]
        await heat(scheduler, tmp_path, "nominal")
        assert isinstance(await scheduler.ensure_loaded(A), Residency)


async def test_f15_critical_strain_leaves_busy_models_and_begun_answers_alone(
    tmp_path: Path, replica: Replica
) -> None:
    async with strained(tmp_path, replica) as scheduler:
        replica.in_flight = 1
        await heat(scheduler, tmp_path, "critical")
        assert replica.held == [A]
        replica.held.clear()
        lost = LoadContext(lost_replica="replica", is_resumed=True)
        assert isinstance(await scheduler.ensure_loaded(A, lost), Residency)


async def test_f15_serious_strain_keeps_models_and_asks_for_cooler_ones(
    tmp_path: Path, replica: Replica
) -> None:
    async with strained(tmp_path, replica) as scheduler:
        assert not (await scheduler.model_states()).keeps_cool
        await heat(scheduler, tmp_path, "serious")
        assert (await scheduler.model_states()).keeps_cool
        assert replica.held == [A]


async def test_f15_jobs_pause_from_fair_on(tmp_path: Path, replica: Replica) -> None:
    async with strained(tmp_path, replica) as scheduler:
        await heat(scheduler, tmp_path, "fair")
        assert (await scheduler.model_states()).strain
        await heat(scheduler, tmp_path, "nominal")
        assert not (await scheduler.model_states()).strain
        actions = [one.action for one in await scheduler.decisions() if "jobs" in one.action]
        assert actions == ["pause jobs", "let jobs go on"]


async def test_memory_is_leased_to_jobs_of_other_processes(
    tmp_path: Path, replica: Replica
) -> None:
    async with started(tmp_path, replica) as scheduler:
        lease = MemoryLease("1", "conversion of a", A, 20 * MIB)
        assert await scheduler.lease_memory(lease, 5.0) is None
        assert (await scheduler.snapshot()).used_bytes == 20 * MIB
        assert await scheduler.renew_memory("1", 30 * MIB)
        assert (await scheduler.snapshot()).used_bytes == 30 * MIB
        refused = await scheduler.delete_model(A)
        assert isinstance(refused, ModelInUse)
        assert "is being converted" in refused.message
        await scheduler.return_memory("1")
        assert (await scheduler.snapshot()).used_bytes == 0
        assert not await scheduler.renew_memory("1", 0)
        large = await scheduler.lease_memory(replace(lease, needed_bytes=GIB), 5.0)
        assert isinstance(large, InsufficientMemory)


async def test_a_model_over_the_budget_is_refused_with_its_nearest_smaller_variant(
    tmp_path: Path, replica: Replica
) -> None:
    async with started(tmp_path, replica) as scheduler:
        record = scheduler._store.get(A)
        assert record is not None

        large = replace(record.info, size_bytes=GIB)
        huge = replace(record, id="a@gguf-f64", info=large)
        problem = InsufficientMemory("too large")
        others = scheduler._store.models()
        named = scheduler._planner.with_smaller(huge, problem, others)
        assert f"Its variant {A} takes " in named.message
        assert scheduler._planner.with_smaller(record, problem, others) is problem
        assert not replica.handle.load_model.calls
