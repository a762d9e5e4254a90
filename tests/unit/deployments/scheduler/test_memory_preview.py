"""What a model would take with other settings, and what its load would evict; nothing is loaded."""

from dataclasses import replace
from typing import Any

import pytest

from core.errors import ModelNotFound
from core.units import MIB
from deployments.messages import MemoryPreview
from deployments.scheduler.deployment import SchedulerReplica
from scheduler.events import AvailableChanged
from tests.unit.deployments.scheduler.scheduling import A, B, Replica

pytestmark = pytest.mark.usefixtures("inspection")


async def previewed(
    scheduler: SchedulerReplica, model_id: str = A, **changes: Any
) -> MemoryPreview:
    found = await scheduler.preview_load(model_id, changes)
    assert isinstance(found, MemoryPreview), found
    return found


def needed_bytes(found: MemoryPreview) -> int:
    return found.weights_bytes + found.kv_bytes + found.overhead_bytes


async def test_a_draft_changes_the_memory_and_loads_nothing(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    whole, less = await previewed(scheduler), await previewed(scheduler, context_length=256)
    assert (whole.load.fit, less.load.fit) == ("now", "now")
    assert (whole.context_tokens, less.context_tokens) == (2048, 256)
    assert whole.kv_bytes == 8 * less.kv_bytes > 0
    assert whole.weights_bytes == less.weights_bytes > 0
    assert whole.load.plan is not None
    assert needed_bytes(whole) == whole.load.plan.needed_bytes
    assert (whole.budget_bytes, whole.held_bytes) == (70 * MIB, 0)
    record = scheduler._store.get(A)
    assert record is not None
    assert record.settings.context_length is None
    assert replica.held == []


async def test_who_would_be_evicted_is_told_and_stays(
    scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(B)
    used = scheduler._ledger.state.used_bytes
    found = await previewed(scheduler)
    assert (found.load.fit, found.load.evicted, found.held_bytes) == ("after_unloading", (B,), used)
    replica.in_flight = 1
    assert (await previewed(scheduler)).load.fit == "after_requests"
    assert replica.held == [B]
    # What the model itself holds is free for its next load.
    own = await previewed(scheduler, B)
    assert (own.load.fit, own.load.evicted, own.held_bytes) == ("now", (), 0)


async def test_what_does_not_fit_is_told_with_the_numbers(scheduler: SchedulerReplica) -> None:
    full = await previewed(scheduler)
    scheduler._ledger._send(AvailableChanged(1000))
    found = await previewed(scheduler)
    assert (found.load.fit, found.limit_bytes) == ("no", 1000)
    assert "other applications leave 1000 B" in found.load.reason
    assert needed_bytes(found) == needed_bytes(full)
    scheduler._ledger._state = replace(scheduler._ledger.state, budget_bytes=1000)
    found = await previewed(scheduler)
    assert found.load.fit == "no"
    assert "does not fit" in found.load.reason or "needs" in found.load.reason
    assert found.weights_bytes == full.weights_bytes


async def test_models_that_cannot_be_loaded_say_why(
    scheduler: SchedulerReplica, tmp_path: Any
) -> None:
    (tmp_path / "models" / "a-F32.gguf").unlink()
    await scheduler._scanner.scan()
    found = await previewed(scheduler)
    assert found.load.fit == "no"
    assert "is gone" in found.load.reason
    assert needed_bytes(found) == 0
    assert isinstance(await scheduler.preview_load("nobody", {}), ModelNotFound)
