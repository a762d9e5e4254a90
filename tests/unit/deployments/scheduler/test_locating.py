"""A model whose files are gone stays as missing, until its files are found or it is removed."""

from pathlib import Path

import pytest

from catalog.bin import BinEntry
from catalog.models import ModelRecord
from core.errors import ModelInUse, ModelNotFound, RequestError
from deployments.scheduler.deployment import SchedulerReplica
from tests.gguf_files import llama_gguf
from tests.unit.deployments.scheduler.scheduling import A, B, Replica

pytestmark = pytest.mark.usefixtures("inspection")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
async def renamed(scheduler: SchedulerReplica, models: Path) -> Path:
    """Give model A settings and an alias, and its file another name."""
    scheduler._store.set_alias("coder", A)
    scheduler._store.change_settings(A, {"pin": True, "tags": ["work"]})
    place = models / "other" / "zeta-F32.gguf"
    place.parent.mkdir()
    (models / "a-F32.gguf").rename(place)
    return place


def record_of(scheduler: SchedulerReplica, model_id: str) -> ModelRecord:
    record = scheduler._store.get(model_id)
    assert record is not None
    return record


async def ids(scheduler: SchedulerReplica) -> list[str]:
    return [record.id for record in await scheduler._lookup.records()]


@pytest.mark.usefixtures("renamed")
async def test_p7_a_model_whose_file_is_gone_stays_with_all_it_had(
    scheduler: SchedulerReplica,
) -> None:
    await scheduler._scanner.scan()
    record = record_of(scheduler, A)
    assert (record.state, record.settings.pin, record.aliases) == ("missing", True, ("coder",))
    assert "zeta@gguf-f32" in await ids(scheduler)


async def test_p7_a_missing_model_is_found_at_the_place_that_the_user_names(
    scheduler: SchedulerReplica, replica: Replica, renamed: Path
) -> None:
    assert await scheduler.locate_model(A, str(renamed)) is None
    assert await ids(scheduler) == [A, B]
    record = record_of(scheduler, A)
    assert (record.state, record.key) == ("ok", str(renamed))
    assert (record.settings.pin, record.settings.tags) == (True, ["work"])
    # Its former bare name goes to it as well.
    assert record.aliases == ("a", "coder")
    await scheduler.ensure_loaded(A)
    assert replica.held == [A]
    # Neither the next scan nor a change of the file gives it another id.
    await scheduler._scanner.scan()
    assert await ids(scheduler) == [A, B]
    llama_gguf(renamed, seed=2)
    await scheduler._scanner.scan()
    assert await ids(scheduler) == [A, B]
    # Once more changes nothing.
    assert await scheduler.locate_model(A, str(renamed)) is None


async def test_a_folder_names_the_model_that_is_in_it(
    scheduler: SchedulerReplica, renamed: Path
) -> None:
    assert await scheduler.locate_model(A, str(renamed.parent)) is None
    assert record_of(scheduler, A).key == str(renamed)


async def test_aliases_of_the_found_model_go_with_its_files(
    scheduler: SchedulerReplica, renamed: Path
) -> None:
    await scheduler._scanner.scan()
    scheduler._store.set_alias("writer", "zeta@gguf-f32")
    scheduler._store.change_settings("zeta@gguf-f32", {"notes": "new"})
    await scheduler.locate_model(A, str(renamed))
    record = record_of(scheduler, A)
    assert record.aliases == ("a", "coder", "writer")
    assert record.settings.notes is None


async def test_other_files_and_places_are_refused(
    scheduler: SchedulerReplica, renamed: Path, models: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.gguf"
    renamed.rename(outside)
    (models / "way-out").symlink_to(tmp_path)
    other = llama_gguf(models / "other-F32.gguf", seed=2)
    for path, reason in (
        (str(outside), "is not in a model folder"),
        (str(models / "way-out" / "outside.gguf"), "is not in a model folder"),
        (str(models / ".." / "outside.gguf"), "is not in a model folder"),
        ("outside.gguf", "must be an absolute path"),
        (f"{models}/\0", "must be an absolute path"),
        (str(models / "none.gguf"), "does not exist"),
        (str(other), "has another model (other@gguf-f32)"),
        (str(renamed.parent), "finds no model"),
    ):
        refused = await scheduler.locate_model(A, path)
        assert isinstance(refused, RequestError), path
        assert reason in refused.message
        assert refused.param == "path"
    present = await scheduler.locate_model(B, str(other))
    assert isinstance(present, RequestError)
    assert "is not missing" in present.message
    assert isinstance(await scheduler.locate_model("nobody", str(other)), ModelNotFound)
    assert record_of(scheduler, A).state == "missing"


async def test_a_model_in_use_keeps_its_files(
    scheduler: SchedulerReplica, replica: Replica, renamed: Path
) -> None:
    await scheduler._scanner.scan()
    await scheduler.ensure_loaded("zeta@gguf-f32")
    replica.in_flight = 1
    assert isinstance(await scheduler.locate_model(A, str(renamed)), ModelInUse)
    assert record_of(scheduler, A).state == "missing"
    replica.in_flight = 0
    assert await scheduler.locate_model(A, str(renamed)) is None
    assert replica.held == []


async def test_p7_a_missing_model_is_removed_at_once(
    scheduler: SchedulerReplica, renamed: Path
) -> None:
    await scheduler._scanner.scan()
    entry = await scheduler.delete_model(A)
    assert isinstance(entry, BinEntry)
    assert (entry.model_id, entry.paths, entry.size_bytes) == (A, (), 0)
    assert await scheduler.binned() == []
    assert await ids(scheduler) == [B, "zeta@gguf-f32"]
    assert renamed.exists()
