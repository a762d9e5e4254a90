"""Models in the Hugging Face cache: links in snapshots/ to blobs that are named by hashes."""

import os
from pathlib import Path

import pytest

from catalog.scan import hub_cache
from catalog.scan.hub_cache import MAX_REVISIONS
from tests.gguf_raw import minimal_gguf
from tests.hub_repository import HubRepository
from tests.unit.catalog.scan.folders import (
    Shelf,
    write_json,
    write_model,
    write_shards,
)

OLD, NEW, OTHER = "a" * 40, "b" * 40, "c" * 40
NICE = "nice-model@safetensors-f32"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model's files outside of the scanned folder."""
    return write_model(tmp_path / "source" / "model-files")


def test_the_link_names_a_model_whose_blobs_are_hashes(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    snapshot = repository.add(OLD, source)
    repository.set_main(OLD)
    assert NICE in shelf.scan().added
    (record,) = [one for one in shelf.store.models() if one.info.files]
    assert record.info.files[0] == snapshot / "model.safetensors"
    assert {path.parent for path in record.info.files} == {snapshot}
    shelf.scan()
    assert shelf.looked == []


def test_main_is_served_also_if_another_revision_is_newer(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    for age, revision in enumerate((OTHER, NEW, OLD)):
        snapshot = repository.add(revision, source)
        os.utime(snapshot, (1e9 - age, 1e9 - age))
    repository.set_main(NEW)
    shelf.scan()
    assert shelf.states() == {NICE: "ok"}
    record = shelf.store.get(NICE)
    assert record is not None
    assert NEW in record.info.files[0].parts


def test_without_main_the_newest_revision_is_served(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    for seconds, revision in ((1, NEW), (3, OLD), (2, OTHER)):
        os.utime(repository.add(revision, source), (seconds, seconds))
    shelf.scan()
    record = shelf.store.get(NICE)
    assert record is not None
    assert OLD in record.info.files[0].parts


def test_a_new_revision_keeps_id_alias_and_settings(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    repository.add(OLD, source)
    repository.set_main(OLD)
    shelf.scan()
    shelf.store.set_alias("mine", NICE)
    shelf.store.change_settings(NICE, {"pin": True})
    # Weights and configuration change.
    write_model(source, max_position_embeddings=256)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    repository.add(NEW, source)
    repository.set_main(NEW)
    shelf.scan()
    assert shelf.states() == {NICE: "ok"}
    (record,) = shelf.store.resolve("mine")
    assert (record.info.context_length, record.settings.pin) == (256, True)
    assert NEW in record.info.files[0].parts


def test_an_older_revision_is_served_until_the_newer_one_is_whole(
    shelf: Shelf, source: Path
) -> None:
    (source / "model.safetensors").unlink()
    shards = write_shards(source)
    repository = HubRepository(shelf.models)
    repository.add(OLD, source)
    repository.set_main(OLD)
    shelf.scan()
    kept = [path.name for path in source.iterdir() if path != shards[2]]
    repository.add(NEW, source, *kept)
    repository.set_main(NEW)
    shelf.scan()
    record = shelf.store.get(NICE)
    assert record is not None
    assert record.state == "ok"
    assert OLD in record.info.files[0].parts
    repository.add(NEW, source, shards[2].name)
    shelf.scan()
    record = shelf.store.get(NICE)
    assert record is not None
    assert record.state == "ok"
    assert NEW in record.info.files[0].parts
    assert "ok" not in {state for one, state in shelf.states().items() if one != NICE}


def test_gguf_files_of_several_revisions_are_all_listed(shelf: Shelf, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    minimal_gguf(first / "Tiny-LM-Q4_0.gguf")
    minimal_gguf(second / "Tiny-LM-F16.gguf", general__file_type=1)
    repository = HubRepository(shelf.models, "org/Tiny-LM-GGUF")
    repository.add(OLD, first)
    repository.add(NEW, second)
    repository.set_main(NEW)
    shelf.scan()
    assert shelf.states() == {"tiny-lm@gguf-f32": "ok", "tiny-lm@gguf-f16": "ok"}


def test_two_repositories_with_one_blob_are_two_models(shelf: Shelf, source: Path) -> None:
    """The shared store of huggingface_hub: every repository's blob is a link to one file."""
    store = shelf.models / "blobs"
    (store / "ab").mkdir(parents=True)
    (store / ".huggingface-shared-blobs").write_text("1")
    for name in ("one/First", "two/Second"):
        repository = HubRepository(shelf.models, name)
        snapshot = repository.add(OLD, source)
        blob = (snapshot / "model.safetensors").resolve()
        shared = store / "ab" / blob.name
        if not shared.exists():
            blob.rename(shared)
        else:
            blob.unlink()
        blob.symlink_to(os.path.relpath(shared, blob.parent))
    shelf.scan()
    assert shelf.states() == {"first@safetensors-f32": "ok", "second@safetensors-f32": "ok"}
    shelf.scan()
    assert shelf.looked == []


@pytest.mark.parametrize("inner", ["", f"models--org--Nice-Model/snapshots/{OLD}"])
def test_a_model_folder_may_be_a_repository_or_a_snapshot(
    shelf: Shelf, source: Path, tmp_path: Path, inner: str
) -> None:
    cache = tmp_path / "cache"
    HubRepository(cache).add(OLD, source)
    shelf.extra = (cache / inner,)
    shelf.scan()
    assert shelf.states() == {NICE: "ok"}


def test_a_copied_cache_without_links_is_found(shelf: Shelf) -> None:
    snapshot = shelf.models / "models--org--Nice-Model" / "snapshots" / OLD
    write_model(snapshot)
    shelf.scan()
    assert shelf.states() == {NICE: "ok"}


def test_datasets_are_left_alone(shelf: Shelf) -> None:
    (shelf.models / "datasets--org--Texts" / "snapshots" / OLD).mkdir(parents=True)
    write_model(shelf.models / "datasets--org--Texts" / "snapshots" / OLD)
    report = shelf.scan()
    assert shelf.states() == {}
    assert shelf.looked == []
    assert any("a dataset or space" in line for line in report.skipped)


def test_thousands_of_snapshots_cost_no_inspection(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    for number in range(2000):
        (repository.snapshot(f"{number:040x}")).mkdir(parents=True)
    repository.add(NEW, source)
    repository.set_main(NEW)
    report = shelf.scan()
    assert shelf.states() == {NICE: "ok"}
    assert len(shelf.looked) <= len(list(source.iterdir()))
    left_out = 2001 - MAX_REVISIONS
    assert any(f"{left_out:,} older revisions" in line for line in report.skipped)


@pytest.mark.parametrize(
    "content",
    [b"../../../../etc", b"\xff\xfe", b"x" * 10_000, b"", b"a/b", b"\0"],
)
def test_a_hostile_ref_is_as_none(shelf: Shelf, source: Path, content: bytes) -> None:
    repository = HubRepository(shelf.models)
    repository.add(OLD, source)
    repository.set_main(OLD)
    (repository.folder / "refs" / "main").write_bytes(content)
    shelf.scan()
    assert shelf.states() == {NICE: "ok"}


def test_a_ref_that_is_a_pipe_or_a_loop_does_not_block(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    repository.add(OLD, source)
    repository.set_main(OLD)
    main = repository.folder / "refs" / "main"
    main.unlink()
    os.mkfifo(main)
    shelf.scan()
    assert shelf.states() == {NICE: "ok"}
    main.unlink()
    main.symlink_to("main")
    shelf.scan()
    assert shelf.states() == {NICE: "ok"}


def test_cycles_of_links_end(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    snapshot = repository.add(OLD, source)
    (snapshot / "again").symlink_to(snapshot)
    (snapshot / "up").symlink_to("../..")
    (repository.folder / "snapshots" / NEW).symlink_to(OLD)
    (repository.folder / "snapshots" / "loop").symlink_to("loop")
    (snapshot / "a.safetensors").symlink_to("b.safetensors")
    (snapshot / "b.safetensors").symlink_to("a.safetensors")
    (repository.folder / "blobs" / "self").symlink_to("self")
    (shelf.models / "models--org--Cycle").symlink_to(shelf.models)
    shelf.scan()
    assert shelf.states()[NICE] == "ok"
    # Two links that lead to each other are refused, once for the folder.
    assert list(shelf.states().values()).count("refused") <= 1


def test_blobs_that_are_gone_are_refused_with_the_reason(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    snapshot = repository.add(OLD, source)
    (snapshot / "model.safetensors").resolve().unlink()
    shelf.scan()
    assert shelf.states() == {"nice-model@safetensors": "refused"}
    assert "target does not exist" in shelf.reason("nice-model@safetensors")
    shelf.scan()
    assert shelf.looked == []


def test_a_link_out_of_the_cache_is_refused_unopened(shelf: Shelf, source: Path) -> None:
    repository = HubRepository(shelf.models)
    snapshot = repository.add(OLD, source)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(source / "model.safetensors")
    shelf.scan()
    assert "outside the model folders" in shelf.reason("nice-model@safetensors")
    assert source / "model.safetensors" not in shelf.looked


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "config.json", "tokenizer.json"]
)
def test_a_model_with_one_file_outside_is_refused(shelf: Shelf, tmp_path: Path, name: str) -> None:
    folder = write_model(shelf.models / "nice-model")
    (folder / "model.safetensors").unlink()
    write_shards(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    shelf.scan()
    assert shelf.states() == {"nice-model@safetensors": "refused"}
    assert f"{name} is a link to a file outside" in shelf.reason("nice-model@safetensors")
    shelf.scan()
    assert shelf.looked == []
    (folder / name).unlink()
    (outside / name).rename(folder / name)
    shelf.scan()
    assert shelf.states() == {NICE: "ok"}


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_leaves_the_snapshot_is_refused(
    shelf: Shelf, source: Path, name: str
) -> None:
    (source / "model.safetensors").unlink()
    write_shards(source)
    write_json(source / "model.safetensors.index.json", {"weight_map": {"a": name}})
    HubRepository(shelf.models).add(OLD, source)
    shelf.scan()
    assert list(shelf.states().values()) == ["refused"]
    assert "not a file" in shelf.reason("nice-model@safetensors")


def test_a_repository_without_snapshots_is_an_ordinary_folder(shelf: Shelf) -> None:
    folder = shelf.models / "models--org--Bare" / "files"
    folder.mkdir(parents=True)
    minimal_gguf(folder / "a-model.gguf")
    assert not hub_cache.is_repository(folder.parent)
    shelf.scan()
    assert shelf.states() == {"a-model@gguf-f32": "ok"}
