"""Compiled Core ML models are kept, found again by content and system, and deleted in time."""

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import ChildOptions
from backends.coreml import compile as compiling
from backends.coreml import compiled
from backends.coreml.compiled import open_place
from backends.coreml.process import CoremlProcess
from backends.coreml.spec import ML_PROGRAM, CoremlSpec
from core.errors import BrokenModel
from core.files import passing_cause
from core.settings import Settings
from tests.coreml_stand_in.install import StandIn


def write_package(folder: Path, weights: bytes = b"weights") -> CoremlSpec:
    """Return the description of a package with these weights."""
    package = folder / "tiny.mlpackage"
    package.mkdir(parents=True, exist_ok=True)
    files = tuple(package / name for name in ("Manifest.json", "model.mlmodel", "weight.bin"))
    for path in files:
        path.write_bytes(weights if path.name == "weight.bin" else path.name.encode())
    return CoremlSpec(files, files[1], package, 9, ML_PROGRAM, {}, {}, {})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled models; this system's build is 24E248."""
    monkeypatch.setattr(compiled, "macos_build", lambda: "24E248")
    return tmp_path / "cache" / "coreml"


@pytest.fixture
def spec(tmp_path: Path) -> CoremlSpec:
    return write_package(tmp_path / "models")


def load(spec: CoremlSpec, folder: Path) -> None:
    """Open a model and close it."""
    CoremlProcess(spec, ChildOptions(compiled_folder=folder)).close()


def names(folder: Path, pattern: str = "*.mlmodelc") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_the_second_load_does_not_compile(
    stand_in: StandIn, spec: CoremlSpec, folder: Path
) -> None:
    load(spec, folder)
    (name,) = names(folder)
    assert name.endswith("-24E248.mlmodelc")
    load(spec, folder)
    os.utime(spec.files[2])
    load(spec, folder)
    assert len(stand_in.calls("compile")) == 1
    # Core ML finds its work for this machine again by the place that it opened the model at.
    assert [one["detail"] for one in stand_in.calls("open")] == [str(folder / name)] * 3
    assert names(folder, ".*") == []
    assert names(stand_in.folder, "temporary*") == []


@pytest.mark.usefixtures("stand_in")
def test_a_copy_of_a_package_shares_its_entry_and_its_lock(
    spec: CoremlSpec, folder: Path, tmp_path: Path
) -> None:
    first = open_place(folder, spec)
    assert first is not None
    first.path.mkdir()
    copy = write_package(tmp_path / "copies")
    second = open_place(folder, copy)
    assert second is not None
    assert second.path == first.path
    second.close()
    shutil.rmtree(copy.package)
    # The first model is still open.
    load(write_package(tmp_path / "models" / "other", b"others"), folder)
    assert first.path.exists()
    first.close()


def test_other_content_and_another_system_compile_again_and_replace_it(
    stand_in: StandIn, spec: CoremlSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(spec, folder)
    first = names(folder)
    write_package(spec.package.parent, b"other w")
    load(spec, folder)
    second = names(folder)
    assert len(second) == 1
    assert second != first
    monkeypatch.setattr(compiled, "macos_build", lambda: "25A354")
    load(spec, folder)
    third = names(folder)
    assert [name.rpartition("-")[2] for name in third] == ["25A354.mlmodelc"]
    assert len(stand_in.calls("compile")) == 3
    assert len(names(folder, "*")) == 2


@pytest.mark.parametrize("damage", ["content", "empty"])
def test_a_damaged_one_is_compiled_again(
    damage: str, stand_in: StandIn, spec: CoremlSpec, folder: Path
) -> None:
    load(spec, folder)
    (name,) = names(folder)
    data = folder / name / "coremldata.bin"
    data.write_text("zeros") if damage == "content" else data.unlink()
    load(spec, folder)
    assert data.read_text() == "compiled"
    assert len(stand_in.calls("compile")) == 2


def test_nothing_is_kept_of_a_compilation_that_failed_or_was_killed(
    stand_in: StandIn, spec: CoremlSpec, folder: Path
) -> None:
    stand_in.set(compile={"error": "no"})
    with pytest.raises(BrokenModel):
        load(spec, folder)
    assert names(folder) == names(folder, ".*") == []
    stand_in.set(compile={"hold_s": 900})
    with pytest.raises(Exception, match=r"took longer than 1 s"):
        CoremlProcess(spec, ChildOptions(1.0, compiled_folder=folder))
    assert names(folder) == []
    assert len(names(folder, ".partial-*")) == 1
    stand_in.set()
    load(spec, folder)
    assert names(folder, ".partial-*") == []
    assert len(names(folder)) == 1


def test_what_cannot_be_opened_after_it_was_compiled_is_not_kept(
    stand_in: StandIn, spec: CoremlSpec, folder: Path
) -> None:
    stand_in.set(open={"error": "unsupported"})
    with pytest.raises(BrokenModel, match="unsupported"):
        load(spec, folder)
    assert names(folder) == []


def test_a_full_disk_is_said_before_core_ml_compiles(
    stand_in: StandIn, spec: CoremlSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(OSError, match=r"needs \d+ MiB of disk") as caught:
        compiling.open_model(
            SimpleNamespace(models=None), str(spec.package), str(folder / "x.mlmodelc")
        )
    assert passing_cause(caught.value)
    assert stand_in.calls() == []


def entry(folder: Path, spec: CoremlSpec, size: int, age: int) -> Path:
    """Make an entry as if it had been used `age` seconds ago; return its folder."""
    place = open_place(folder, spec)
    assert place is not None
    place.path.mkdir()
    (place.path / "weight.bin").write_bytes(bytes(size))
    place.close()
    at = place.path.stat().st_mtime - age
    os.utime(place.path.with_suffix(".json"), (at, at))
    return place.path


def test_entries_of_deleted_models_are_deleted(tmp_path: Path, folder: Path) -> None:
    gone, kept = (write_package(tmp_path / name, name.encode()) for name in ("gone", "kept"))
    of_gone, of_kept = entry(folder, gone, 10, 60), entry(folder, kept, 10, 60)
    assert of_gone.is_dir()
    gone.package.rename(tmp_path / "elsewhere")
    entry(folder, write_package(tmp_path / "third", b"third"), 10, 0)
    assert not of_gone.exists()
    assert not of_gone.with_suffix(".json").exists()
    assert of_kept.is_dir()


def test_the_folder_is_bounded_and_loses_what_was_used_longest_ago(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [write_package(tmp_path / str(n), str(n).encode()) for n in range(4)]
    oldest, older, newer = (
        entry(folder, spec, 100, age) for spec, age in zip(specs[:3], (10, 30, 20), strict=True)
    )
    monkeypatch.setattr(compiled, "_MOST_BYTES", 250)
    entry(folder, specs[3], 100, 0)
    assert [path.exists() for path in (oldest, older, newer)] == [True, False, True]
    # One that is open stays, also when it is the oldest.
    held = open_place(folder, specs[0])
    assert held is not None
    os.utime(held.path.with_suffix(".json"), (1, 1))
    monkeypatch.setattr(compiled, "_MOST_BYTES", 0)
    last = open_place(folder, specs[3])
    assert last is not None
    assert held.path.is_dir()
    assert not newer.exists()
    held.close()
    last.close()
    last = open_place(folder, specs[3])
    assert last is not None
    assert not held.path.exists()
    assert last.path.is_dir()
    last.close()


def test_strange_files_and_entries_without_a_note_do_no_harm(
    spec: CoremlSpec, folder: Path
) -> None:
    folder.mkdir(parents=True)
    (folder / "unknown.mlmodelc").mkdir()
    for name, data in (("a.json", b"{"), ("b.json", b"[1]"), ("c.json", b'"\\u0000"')):
        (folder / name).write_bytes(data)
    (folder / ".partial-1-of-a-running-process").mkdir()
    place = open_place(folder, spec)
    assert place is not None
    place.close()
    kept = [".partial-1-of-a-running-process", place.path.with_suffix(".json").name]
    assert names(folder, "*") == kept


def test_a_folder_that_cannot_be_used_costs_the_cache_alone(
    stand_in: StandIn, spec: CoremlSpec, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_bytes(b"a file")
    load(spec, folder)
    assert "compiled Core ML models are not kept" in caplog.text
    assert stand_in.calls("compile")
    assert stand_in.calls("open") == []


def test_two_processes_compile_the_same_model_at_the_same_time(
    stand_in: StandIn, spec: CoremlSpec, folder: Path
) -> None:
    stand_in.set(compile={"hold_s": 0.5})
    problems: list[Any] = []

    def run() -> None:
        try:
            load(spec, folder)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert problems == []
    assert len(names(folder)) == 1
    assert names(folder, ".*") == []


def test_links_of_hugging_faces_cache_are_followed(
    tmp_path: Path, spec: CoremlSpec, folder: Path
) -> None:
    blob = tmp_path / "blob"
    spec.files[2].rename(blob)
    spec.files[2].symlink_to(blob)
    first = open_place(folder, spec)
    blob.write_bytes(b"others!")
    second = open_place(folder, spec)
    assert first is not None
    assert second is not None
    assert first.path != second.path
    first.close()
    second.close()


def test_the_servers_compiled_models_are_in_the_cache_that_is_not_backed_up(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.compiled_folder.is_relative_to(tmp_path / "cache")
