"""A dead process is forgotten whole, and its death is charged to what it was computing."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import BrokenModel, ImpetusError, ModelFileChanged, ModelFileMissing
from core.units import GIB
from deployments.activity import DeathCause
from deployments.messages import LoadContext, ProcessReport, Residency, UnloadResult
from deployments.scheduler.deployment import SchedulerReplica
from deployments.scheduler.formats import FormatClients
from deployments.serve.handles import ReplicaDied
from tests.gguf_files import llama_gguf
from tests.unit.deployments.scheduler.scheduling import A, B, Replica, gguf_runs, started

pytestmark = pytest.mark.usefixtures("inspection")

ONLY_A, NOBODY = DeathCause(frozenset({A})), DeathCause()


@pytest.fixture
async def roomy(tmp_path: Path, replica: Replica) -> Any:
    """A scheduler with room for both models."""
    async with started(tmp_path, replica) as scheduler:
        scheduler._ledger._state = _with_budget(scheduler)
        for model in (A, B):
            assert isinstance(await scheduler.ensure_loaded(model), Residency)
        yield scheduler


def _with_budget(scheduler: SchedulerReplica) -> Any:
    return replace(scheduler._ledger.state, budget_bytes=GIB)


def die(replica: Replica, cause: DeathCause | None, number: int = 0) -> LoadContext:
    """Let the process die; return what a router then tells of it."""
    old = replica.name
    if cause is not None:
        replica.causes[old] = cause
    replica.name = f"replica-{number + 1}"
    replica.held.clear()
    return LoadContext(lost_replica=old, has_died=True)


async def faults(scheduler: SchedulerReplica) -> dict[str, str]:
    return {name: fault.reason for name, fault in (await scheduler.model_states()).faults.items()}


async def test_a_bystander_that_reports_deaths_is_not_charged(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    for number in range(3):
        lost = die(replica, ONLY_A, number)
        # The bystander is the first that tells of it, and tells it twice.
        for _ in range(2):
            assert isinstance(await roomy.ensure_loaded(B, lost), Residency)
        if number < 2:
            assert isinstance(await roomy.ensure_loaded(A, lost), Residency)
    assert set(await faults(roomy)) == {A}
    refused: Any = await roomy.ensure_loaded(A)
    assert refused.code == "model_quarantined"
    assert "3 processes died while they computed it within 5 minutes" in refused.message
    assert isinstance(await roomy.ensure_loaded(B), Residency)
    assert f"quarantine {A}" in [one.action for one in await roomy.decisions()]


async def test_a_confirmed_cause_clears_the_models_that_were_charged_beside_it(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    """The first death of each request is not told apart from other work at that moment."""
    both = DeathCause(frozenset({A, B}))
    for number in range(3):
        await roomy.process_died(B, die(replica, both, number).lost_replica)
    assert set(await faults(roomy)) == {A, B}
    confirmed = DeathCause(frozenset({A}), frozenset({1}), is_confirmed=True)
    await roomy.process_died(A, die(replica, confirmed, 3).lost_replica)
    assert set(await faults(roomy)) == {A}
    assert isinstance(await roomy.ensure_loaded(B), Residency)


async def test_a_process_that_dies_idle_charges_nobody(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    for number in range(4):
        lost = die(replica, NOBODY, number)
        assert isinstance(await roomy.ensure_loaded(A, lost), Residency)
    assert await faults(roomy) == {}


async def test_without_a_record_the_one_that_reports_it_is_charged(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    for number in range(3):
        await roomy.process_died(B, die(replica, None, number).lost_replica)
    assert set(await faults(roomy)) == {B}


async def test_a_death_during_a_load_is_charged_to_the_model_being_loaded(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    await roomy.unload(A)
    for _ in range(3):
        replica.causes[replica.name] = ONLY_A
        replica.failure = ReplicaDied("The process died.")
        assert isinstance(await roomy.ensure_loaded(A), ImpetusError)
        replica.failure = None
        # The other model was in the same process.
        assert isinstance(await roomy.ensure_loaded(B), Residency)
    assert set(await faults(roomy)) == {A}


@pytest.mark.parametrize("cause", [ONLY_A, DeathCause(frozenset({B})), None])
async def test_a_load_is_told_whether_its_process_died_of_it(
    roomy: SchedulerReplica, replica: Replica, cause: DeathCause | None
) -> None:
    await roomy.unload(A)
    if cause is not None:
        replica.causes[replica.name] = cause
    replica.failure = ReplicaDied("The process died.")
    problem: Any = await roomy.ensure_loaded(A)
    assert isinstance(problem, ReplicaDied)
    assert problem.is_bystander == (cause is not None and A not in cause.models)


async def test_a_replaced_file_is_loaded_beside_its_old_requests(
    roomy: SchedulerReplica, replica: Replica, tmp_path: Path
) -> None:
    (old,) = [one for one in roomy._ledger.residencies if one.model_id == A]
    used = roomy._ledger.state.used_bytes
    llama_gguf(tmp_path / "models" / "a-F32.gguf", seed=5)
    # The old load still has a request, so its unload takes a while.
    replica.gate.clear()
    new = await roomy.ensure_loaded(A, LoadContext(lost_replica=replica.name))
    assert isinstance(new, Residency)
    assert new is not old
    assert roomy._ledger.state.used_bytes > used
    (unload,) = replica.handle.unload_model.calls
    assert unload == (A, old)
    replica.gate.set()
    while roomy._ledger.state.used_bytes > used:
        await asyncio.sleep(0.001)
    assert {one.model_id for one in roomy._ledger.residencies} == {A, B}
    assert f"drain {A}" in [one.action for one in await roomy.decisions()]


async def test_a_replaced_file_waits_for_its_old_requests_where_memory_is_short(
    tmp_path: Path, replica: Replica
) -> None:
    async with started(tmp_path, replica) as scheduler:
        await scheduler.ensure_loaded(A)
        replica.gate.clear()
        lost = LoadContext(lost_replica=replica.name)
        new = asyncio.ensure_future(scheduler.ensure_loaded(A, lost))
        while not scheduler._ledger.state.waiting:
            await asyncio.sleep(0.001)
        assert len(replica.handle.load_model.calls) == 1
        replica.gate.set()
        assert isinstance(await new, Residency)
        assert len(replica.handle.load_model.calls) == 2


async def test_one_report_of_a_death_removes_all_that_the_process_held(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    assert roomy._ledger.state.used_bytes
    asked = len(replica.handle.residencies.calls)
    lost = die(replica, ONLY_A)
    await roomy.process_died(A, lost.lost_replica)
    states = await roomy.model_states()
    assert states.residencies == ()
    assert roomy._ledger.state.used_bytes == 0
    assert roomy._ledger.state.residents == ()
    # What is certain is not asked for, nor is a new process told to unload.
    assert len(replica.handle.residencies.calls) == asked
    assert not replica.handle.unload_model.calls


async def test_a_model_that_is_restored_after_its_process_was_examined_is_forgotten_too(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    held = (await roomy.model_states()).residencies
    lost = die(replica, ONLY_A)
    await roomy.process_died(A, lost.lost_replica)
    for residency in held:
        roomy._ledger.restore(residency, 1)
    assert roomy._ledger.residencies
    loaded = await roomy.ensure_loaded(A, lost)
    assert isinstance(loaded, Residency)
    assert loaded.replica_id == replica.name
    assert roomy._ledger.residencies == [loaded]


async def test_a_process_that_is_out_of_reach_keeps_what_it_confirms(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    held = (await roomy.model_states()).residencies
    replica.found[:] = held
    await roomy.process_died(A, replica.name)
    assert (await roomy.model_states()).residencies == held
    # When it dies later, that is found out anew.
    replica.found.clear()
    await roomy.process_died(A, die(replica, ONLY_A).lost_replica)
    assert (await roomy.model_states()).residencies == ()


async def test_models_of_a_process_that_died_idle_are_forgotten_without_any_request(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    replica.listed = frozenset({replica.name})
    roomy._deaths._checked_at = 0.0
    assert len((await roomy.model_states()).residencies) == 2
    die(replica, NOBODY)
    replica.listed = frozenset({replica.name})
    # Serve is not asked all the time.
    assert len((await roomy.model_states()).residencies) == 2
    roomy._deaths._checked_at = 0.0
    assert (await roomy.model_states()).residencies == ()
    assert roomy._ledger.state.used_bytes == 0
    assert isinstance(await roomy.ensure_loaded(A), Residency)
    assert await faults(roomy) == {}


async def test_a_process_that_serve_forgot_but_that_lives_keeps_its_models(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    """Serve's controller may have restarted."""
    held = (await roomy.model_states()).residencies
    replica.found[:] = held
    replica.listed = frozenset()
    roomy._deaths._checked_at = 0.0
    assert (await roomy.model_states()).residencies == held
    # It is gone, and left no record: what asks for its models finds none.
    replica.found.clear()
    replica.held.clear()
    roomy._deaths._checked_at = 0.0
    assert (await roomy.model_states()).residencies == ()
    while roomy._ledger.state.residents:
        await asyncio.sleep(0.001)


async def test_a_usage_report_of_another_process_confirms_nothing(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    """The model was loaded elsewhere; a new process of the format holds one of the same name."""
    replica.name = "another"
    await roomy._ledger.refresh()
    assert roomy._ledger.residencies == []
    assert roomy._ledger.state.residents == ()


async def test_memory_that_a_dead_process_kept_is_free(
    roomy: SchedulerReplica, replica: Replica
) -> None:
    replica.freed = UnloadResult(40, 8, 32, is_known=True)
    replica.kept_bytes = 32
    await roomy.unload(B)
    assert roomy._ledger.state.kept_bytes == 32
    replica.kept_bytes = 0
    await roomy.process_died(A, die(replica, ONLY_A).lost_replica)
    assert roomy._ledger.state.used_bytes == 0


async def test_a_file_that_was_truncated_under_its_engine_is_named_in_the_reason(
    roomy: SchedulerReplica, replica: Replica, tmp_path: Path
) -> None:
    path = tmp_path / "models" / "a-F32.gguf"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    for number in range(3):
        await roomy.process_died(A, die(replica, ONLY_A, number).lost_replica)
    (reason,) = (await faults(roomy)).values()
    assert f"Before the last death the file {path} changed on disk: it was truncated" in reason
    assert f"({size:,} bytes)" in reason
    assert f"({size // 2:,} bytes)" in reason


async def test_a_file_that_changed_before_its_load_is_no_failure_of_the_model(
    tmp_path: Path, replica: Replica
) -> None:
    async with started(tmp_path, replica) as scheduler:
        path = tmp_path / "models" / "a-F32.gguf"
        (request,) = await _requests_of(scheduler, replica)
        assert request.signatures == (
            f"{path.stat().st_size}-{path.stat().st_mtime_ns}-{path.stat().st_ino}",
        )
        await scheduler.unload(A)
        replica.failure = ModelFileChanged("a changed", retry_after_s=1)
        llama_gguf(path, seed=5)
        changed: Any = await scheduler.ensure_loaded(A)
        assert changed.code == "model_file_changed"
        replica.failure = None
        # The sound file is loaded by the next request, with what was read of it anew.
        before = request.signatures
        assert isinstance(await scheduler.ensure_loaded(A), Residency)
        assert replica.handle.load_model.calls[-1][0].signatures != before
        assert not (await scheduler.model_states()).faults


async def _requests_of(scheduler: SchedulerReplica, replica: Replica) -> list[Any]:
    await scheduler.ensure_loaded(A)
    return [call[0] for call in replica.handle.load_model.calls]


async def test_a_file_that_was_truncated_before_its_load_is_refused_with_the_sizes(
    tmp_path: Path, replica: Replica
) -> None:
    async with started(tmp_path, replica) as scheduler:
        path = tmp_path / "models" / "a-F32.gguf"
        size = path.stat().st_size
        replica.failure = ModelFileChanged("a changed", retry_after_s=1)
        os.truncate(path, 5000)
        for _ in range(2):
            refused: Any = await scheduler.ensure_loaded(A)
            assert isinstance(refused, BrokenModel)
            assert f"{path} changed on disk" in refused.message
            assert f"({size:,} bytes)" in refused.message
            assert "(5,000 bytes)" in refused.message
        assert len(replica.handle.load_model.calls) == 1
        assert not (await scheduler.model_states()).faults
        path.unlink()
        await scheduler.rescan()
        assert isinstance(await scheduler.ensure_loaded(A), ModelFileMissing)


async def test_processes_that_ended_are_remembered_within_a_bound(replica: Replica) -> None:
    handles: Any = {"gguf": replica.handle}
    clients = FormatClients(handles, {}, gguf_runs)
    for number in range(100):
        clients._record_processes("gguf", [ProcessReport(f"replica-{number}", 0, "")])
    assert len(clients._processes) <= 33
    assert await clients.stderr_tail("replica-98") == ""
    await asyncio.sleep(0)
