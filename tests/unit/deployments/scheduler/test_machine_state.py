"""The event stream's view of the scheduler: memory, strain, decisions, unloads, catalog changes."""

import asyncio
import shutil

import pytest

from core.settings import Settings
from core.units import MIB
from deployments.messages import MachineState
from deployments.scheduler.deployment import SchedulerReplica
from tests.unit.deployments.scheduler.scheduling import A, Replica, stop_polling
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("inspection")


async def next_state(scheduler: SchedulerReplica, known: MachineState) -> MachineState:
    return await asyncio.wait_for(
        scheduler.machine_state(known.version, known.decision_number, 10.0), 10
    )


async def test_memory_and_decisions_are_told_when_they_change(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    await stop_polling(scheduler)
    first = await scheduler.machine_state(-1, 0, 0.0)
    assert (first.budget_bytes, first.used_bytes, first.uses) == (70 * MIB, 0, ())
    waiting = asyncio.ensure_future(next_state(scheduler, first))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    replica.may_load.clear()
    load = asyncio.ensure_future(scheduler.ensure_loaded(A))
    loading = await waiting
    assert [(one.name, one.kind) for one in loading.uses] == [(A, "loading")]
    assert [one.action for one in loading.decisions] == [f"load {A}"]
    replica.may_load.set()
    await load
    held = await next_state(scheduler, loading)
    assert [(one.name, one.kind) for one in held.uses] == [(A, "model")]
    assert held.used_bytes == held.uses[0].size_bytes > 0
    assert loading.decision_number < held.decision_number
    # Only what is new; with nothing new the call takes as long as it may.
    same = await scheduler.machine_state(held.version, held.decision_number, 0.05)
    assert (same.version, same.decisions) == (held.version, ())
    # Nobody else's decision makes a new version without waking those who wait.
    waiting = asyncio.ensure_future(next_state(scheduler, held))
    await asyncio.sleep(0)
    scheduler._log.record("test", "act", "because")
    assert [one.reason for one in (await waiting).decisions] == ["because"]


async def test_an_unload_is_told_while_it_lasts(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    replica.gate.clear()
    unload = asyncio.ensure_future(scheduler.unload(A))
    await wait_until(lambda: scheduler._published.current().unloading == (A,), "it unloads")
    assert [one.kind for one in scheduler._machine.current().uses] == ["unloading"]
    replica.gate.set()
    await unload
    assert scheduler._published.current().unloading == ()


async def test_the_catalog_has_another_version_after_changes_only(
    scheduler: SchedulerReplica,
) -> None:
    settings: Settings = scheduler._settings
    version = (await scheduler.model_states()).catalog_version
    await scheduler._scanner.scan()
    assert scheduler._published.current().catalog_version == version
    folder = settings.home / "models"
    shutil.copy(folder / "a-F32.gguf", folder / "c-F32.gguf")
    # A scan leaves a file alone that is so new, and lists it as arriving: that is a change.
    await scheduler._scanner.scan()
    arrived = scheduler._published.current().catalog_version
    assert arrived > version
    await scheduler.settings_changed(A)
    assert scheduler._published.current().catalog_version > arrived
