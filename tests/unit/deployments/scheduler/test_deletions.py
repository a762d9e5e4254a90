"""Deleting models while the scheduler runs: refused in use, unloaded first, restored whole."""

import asyncio
import time
from pathlib import Path

import pytest

from catalog.bin import KEPT_S, BinEntry
from core.errors import ModelInUse, ModelNotFound, NotFound
from deployments.scheduler.deployment import SchedulerReplica
from tests.unit.deployments.scheduler.scheduling import A, B, Replica

pytestmark = pytest.mark.usefixtures("inspection")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "models" / "a-F32.gguf"


async def ids(scheduler: SchedulerReplica) -> list[str]:
    return [record.id for record in await scheduler._lookup.records()]


async def deleted(scheduler: SchedulerReplica, model_id: str) -> BinEntry:
    entry = await scheduler.delete_model(model_id)
    assert isinstance(entry, BinEntry), entry
    return entry


async def test_a_deleted_model_is_unloaded_and_comes_back_with_all_it_had(
    scheduler: SchedulerReplica, replica: Replica, file: Path
) -> None:
    size = file.stat().st_size
    scheduler._store.set_alias("coder", A)
    scheduler._store.change_settings(A, {"pin": True, "tags": ["work"]})
    await scheduler.ensure_loaded(A)
    entry = await deleted(scheduler, A)
    assert (replica.held, file.exists()) == ([], False)
    assert entry.size_bytes == size
    assert await ids(scheduler) == [B]
    assert scheduler._store.aliases() == {}
    assert await scheduler.binned() == [entry]
    assert isinstance(await scheduler.ensure_loaded(A), ModelNotFound)

    assert await scheduler.restore_model(entry.id) == entry
    assert await ids(scheduler) == [A, B]
    record = scheduler._store.get(A)
    assert record is not None
    assert (record.aliases, record.settings.pin) == (("coder",), True)
    assert record.settings.tags == ["work"]
    assert await scheduler.binned() == []
    await scheduler.ensure_loaded(A)
    assert replica.held == [A]


async def test_p6_a_model_in_use_stays_until_its_requests_have_ended(
    scheduler: SchedulerReplica, replica: Replica, file: Path
) -> None:
    await scheduler.ensure_loaded(A)
    replica.in_flight = 2
    refused = await scheduler.delete_model(A)
    assert isinstance(refused, ModelInUse)
    assert "2 of its requests run" in refused.message
    assert (replica.held, file.exists()) == ([A], True)
    replica.in_flight = 0
    await deleted(scheduler, A)
    assert (replica.held, file.exists()) == ([], False)


async def test_p6_a_model_that_is_being_loaded_stays(
    scheduler: SchedulerReplica, replica: Replica, file: Path
) -> None:
    replica.may_load.clear()
    loading = asyncio.ensure_future(scheduler.ensure_loaded(A))
    while not replica.handle.load_model.calls:
        await asyncio.sleep(0)
    assert isinstance(await scheduler.delete_model(A), ModelInUse)
    assert file.exists()
    replica.may_load.set()
    await loading


async def test_an_alias_that_was_given_away_stays_where_it_is(
    scheduler: SchedulerReplica, file: Path
) -> None:
    scheduler._store.set_alias("coder", A)
    entry = await deleted(scheduler, A)
    scheduler._store.set_alias("Coder", B)
    await scheduler.restore_model(entry.id)
    assert file.exists()
    assert scheduler._store.aliases() == {"Coder": B}


async def test_purged_and_unknown_entries_are_not_found(
    scheduler: SchedulerReplica, tmp_path: Path
) -> None:
    entry = await deleted(scheduler, A)
    assert await scheduler.purge_model(entry.id) == entry
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["b-F32.gguf"]
    assert isinstance(await scheduler.purge_model(entry.id), NotFound)
    assert isinstance(await scheduler.restore_model("../../x"), NotFound)
    assert isinstance(await scheduler.delete_model("nobody"), ModelNotFound)


async def test_a_scan_purges_what_is_a_day_old(
    scheduler: SchedulerReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = await deleted(scheduler, A)
    await scheduler._scanner.scan()
    assert await scheduler.binned() == [entry]
    later = time.time() + KEPT_S
    monkeypatch.setattr("deployments.scheduler.scanning.time.time", lambda: later)
    await scheduler._scanner.scan()
    assert await scheduler.binned() == []
