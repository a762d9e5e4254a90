"""What scans remember: files that are no models, and files that could not be inspected."""

import errno
import os
from pathlib import Path

import pytest

from catalog.models import Converted
from catalog.scan.identify import Outcome, Refused, Uninspected, Unknown, examine
from catalog.scan.scan import scan
from catalog.store import CatalogStore
from core.settings import Settings
from tests.gguf_raw import minimal_gguf
from tests.unit.catalog.library import GgufIdentification, Library


class Scans:
    """Scans a library with an inspection that fails where a test says so."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.failing: set[str] = set()
        self.looked: list[str] = []
        self.now = 1000.0

    def identify(self, path: Path) -> Outcome:
        self.looked.append(path.name)
        if path.name in self.failing:
            return Uninspected("it took longer than 60 s")
        return examine(path, [self.library.backend])

    def scan(self, *urgent: Path, later_s: float = 0.0) -> list[str]:
        """Scan; return the names of the files that were inspected."""
        self.looked.clear()
        self.now += later_s
        scan(
            Settings(home=self.library.home, models_path=list(self.library.extra), starters=False),
            self.library.store,
            [self.library.backend],
            identify_file=self.identify,
            clock=lambda: self.now,
            urgent={str(path) for path in urgent},
        )
        return self.looked.copy()

    def states(self) -> dict[str, tuple[str, str]]:
        """Return state and reason by id."""
        return {one.id: (one.state, one.reason) for one in self.library.store.models()}


@pytest.fixture
def scans(library: Library) -> Scans:
    return Scans(library)


@pytest.fixture
def notes(library: Library) -> list[Path]:
    """Files beside a model that are no models themselves."""
    names = ("README.md", "config.json", "notes.txt", "weights.bin")
    for name in names:
        (library.models / name).write_text("{}")
    return [library.models / name for name in names]


def test_a_file_that_is_no_model_is_looked_at_once(scans: Scans, notes: list[Path]) -> None:
    minimal_gguf(scans.library.models / "a.gguf")
    assert sorted(scans.scan()) == sorted(["a.gguf", *(path.name for path in notes)])
    version = scans.library.store.data_version()
    assert scans.scan(later_s=1e6) == []
    assert scans.library.store.data_version() == version
    # Another process remembers it as well.
    scans.library.store.close()
    scans.library.store = CatalogStore(scans.library.home / "catalog.sqlite")
    assert scans.scan() == []


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_a_changed_file_is_looked_at_again(scans: Scans, notes: list[Path], change: str) -> None:
    path = notes[2]
    scans.scan()
    status = path.stat()
    if change == "size":
        path.write_text("longer than before")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(path, (5, 5))
    else:
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        copy.replace(path)
    assert "notes.txt" in scans.scan()
    assert scans.scan() == []


def test_a_file_that_becomes_a_model_is_found(scans: Scans) -> None:
    path = scans.library.models / "late"
    path.write_text("not yet")
    scans.scan()
    assert scans.library.ids() == []
    path = path.rename(path.with_suffix(".gguf"))
    minimal_gguf(path)
    assert scans.scan() == ["late.gguf"]
    assert scans.library.ids() == ["late@gguf-f32"]
    assert scans.library.store.inspections() == {}


def test_weights_are_looked_at_again_when_their_folder_changes(
    scans: Scans, notes: list[Path]
) -> None:
    scans.scan()
    # A config beside weights can make them a model, also when it is edited in place.
    notes[1].write_text('{"model_type": "llama"}')
    assert sorted(scans.scan()) == ["config.json", "weights.bin"]
    (scans.library.models / "tokenizer.json").write_text("{}")
    assert sorted(scans.scan()) == ["tokenizer.json", "weights.bin"]


def test_another_set_of_formats_looks_again(scans: Scans, notes: list[Path]) -> None:
    scans.scan()
    scans.library.backend = type("Other", (GgufIdentification,), {"name": "other"})()
    assert len(scans.scan()) == len(notes)
    assert scans.scan() == []


def test_deleted_files_are_forgotten(scans: Scans, notes: list[Path]) -> None:
    scans.scan()
    assert len(scans.library.store.inspections()) == len(notes)
    for path in notes:
        path.unlink()
    scans.scan()
    assert scans.library.store.inspections() == {}


def test_a_failed_inspection_is_tried_again_with_growing_delays(scans: Scans) -> None:
    path = minimal_gguf(scans.library.models / "a.gguf")
    scans.failing = {"a.gguf"}
    assert scans.scan() == ["a.gguf"]
    # Nothing is known of it, so it is not a model of the catalog.
    assert scans.states() == {}
    assert scans.library.store.inspections()[str(path)].verdict == "uninspected"
    assert scans.scan(later_s=59) == []
    assert scans.scan(later_s=2) == ["a.gguf"]
    assert scans.scan(later_s=61) == []
    assert scans.scan(later_s=60) == ["a.gguf"]
    for _ in range(20):
        assert scans.scan(later_s=3601) == ["a.gguf"]
    scans.failing.clear()
    assert scans.scan(later_s=3601) == ["a.gguf"]
    assert scans.states() == {"a@gguf-f32": ("ok", "")}
    assert scans.library.store.inspections() == {}


def test_a_file_that_a_request_waits_for_is_tried_at_once(scans: Scans) -> None:
    path = minimal_gguf(scans.library.models / "a.gguf")
    scans.failing = {"a.gguf"}
    scans.scan()
    scans.failing.clear()
    assert scans.scan() == []
    assert scans.scan(path) == ["a.gguf"]
    assert scans.states() == {"a@gguf-f32": ("ok", "")}
    # What is known of a file does not depend on who waits for it.
    assert scans.scan(path) == []


def test_a_clock_that_was_set_back_does_not_postpone_it(scans: Scans) -> None:
    minimal_gguf(scans.library.models / "a.gguf")
    scans.failing = {"a.gguf"}
    scans.scan(later_s=1e9)
    assert scans.scan(later_s=-1e9) == ["a.gguf"]


def test_a_known_model_keeps_its_entry_while_it_cannot_be_inspected(scans: Scans) -> None:
    path = minimal_gguf(scans.library.models / "a.gguf")
    scans.scan()
    scans.library.store.set_alias("mine", "a@gguf-f32")
    minimal_gguf(path, general__file_type=1)
    scans.failing = {"a.gguf"}
    scans.scan()
    reason = "it took longer than 60 s"
    assert scans.states() == {"a@gguf-f32": ("uninspected", reason)}
    assert scans.library.store.resolve("mine")[0].state == "uninspected"
    scans.failing.clear()
    scans.scan(path)
    assert scans.states() == {"a@gguf-f16": ("ok", "")}
    assert scans.library.store.resolve("mine")[0].id == "a@gguf-f16"


def test_a_refused_model_can_become_uninspected_and_whole(scans: Scans) -> None:
    path = minimal_gguf(scans.library.models / "a.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    scans.scan()
    assert [state for state, _ in scans.states().values()] == ["refused"]
    path.write_bytes(whole)
    scans.failing = {"a.gguf"}
    scans.scan()
    assert [state for state, _ in scans.states().values()] == ["uninspected"]
    scans.failing.clear()
    scans.scan(path)
    assert scans.states() == {"a@gguf-f32": ("ok", "")}


def test_a_file_that_is_back_as_it_was_needs_no_inspection(scans: Scans) -> None:
    path = minimal_gguf(scans.library.models / "a.gguf")
    scans.scan()
    before = path.stat()
    os.utime(path, (5, 5))
    scans.failing = {"a.gguf"}
    scans.scan()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert scans.scan() == []
    assert scans.states() == {"a@gguf-f32": ("ok", "")}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_or_folder_that_cannot_be_read_for_now_keeps_its_models(
    scans: Scans, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = scans.library.models / "locked"
    folder.mkdir()
    minimal_gguf(folder / "a.gguf")
    path = minimal_gguf(scans.library.models / "b.gguf")
    scans.scan()
    listing, access = os.scandir, os.access

    def fail(where: Path) -> object:
        if Path(where) == folder:
            raise OSError(number, os.strerror(number))
        return listing(where)

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(
        os, "access", lambda where, mode: str(where) != str(path) and access(where, mode)
    )
    assert scans.scan() == []
    assert scans.states() == {"a@gguf-f32": ("ok", ""), "b@gguf-f32": ("ok", "")}


def test_a_folder_that_was_deleted_does_not(scans: Scans) -> None:
    folder = scans.library.models / "folder"
    folder.mkdir()
    minimal_gguf(folder / "a.gguf").rename(folder / "b.gguf")
    scans.scan()
    (folder / "b.gguf").unlink()
    folder.rmdir()
    scans.scan()
    assert [state for state, _ in scans.states().values()] == ["missing"]


def test_a_verdict_about_content_is_kept(scans: Scans) -> None:
    (scans.library.models / "b.gguf").write_bytes(b"GGUF" + bytes(3))
    assert scans.scan() == ["b.gguf"]
    assert scans.scan(later_s=1e6) == []
    assert isinstance(scans.identify(scans.library.models / "b.gguf"), Refused)
    (scans.library.models / "c.txt").write_text("x")
    assert isinstance(scans.identify(scans.library.models / "c.txt"), Unknown)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_fails_costs_no_other_folder_its_models(
    scans: Scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    other = tmp_path / "disk"
    other.mkdir()
    minimal_gguf(other / "b.gguf")
    scans.library.extra = (other,)
    scans.scan()
    is_dir = Path.is_dir

    def fail(path: Path) -> bool:
        if path == other:
            raise OSError(number, os.strerror(number))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", fail)
    minimal_gguf(scans.library.models / "a.gguf")
    scans.scan()
    assert scans.states() == {"a@gguf-f32": ("ok", ""), "b@gguf-f32": ("ok", "")}


def test_a_disk_that_is_not_mounted_costs_its_models_until_it_is_back(
    scans: Scans, tmp_path: Path
) -> None:
    disk, away = tmp_path / "disk", tmp_path / "away"
    disk.mkdir()
    minimal_gguf(disk / "b.gguf")
    scans.library.extra = (disk,)
    scans.scan()
    scans.library.store.set_alias("mine", "b@gguf-f32")
    disk.rename(away)
    scans.scan()
    assert [state for state, _ in scans.states().values()] == ["missing"]
    away.rename(disk)
    scans.scan()
    assert scans.library.store.resolve("mine")[0].state == "ok"


def test_an_error_while_provenance_is_read_does_not_make_an_original(
    scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scans.library.models / "converted"
    folder.mkdir()
    minimal_gguf(folder / "a.gguf")
    (folder / "provenance.json").write_text('{"parameters": {"model_id": "m@safetensors"}}')
    read_text = Path.read_text

    def fail(path: Path, *arguments: str) -> str:
        if path.name == "provenance.json":
            raise OSError(errno.EMFILE, "Too many open files")
        return read_text(path, *arguments)

    with monkeypatch.context() as context:
        context.setattr(Path, "read_text", fail)
        scans.scan()
        assert scans.states() == {}
    # It is inspected again as after any other trouble that passes.
    scans.scan()
    assert scans.states() == {}
    scans.scan(later_s=61)
    assert scans.library.store.models()[0].source == Converted(
        str(scans.library.models), "m@safetensors"
    )
