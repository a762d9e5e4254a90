"""A scan when nothing has changed reads nothing; whatever changes is seen."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from backends.registry import load_backends
from catalog.last_scan import LastScan
from catalog.models import ScanReport
from catalog.scan import scan as module
from catalog.scan.identify import Uninspected
from catalog.scan.scan import scan
from catalog.scan.walk import WalkResult, walk
from catalog.store import CatalogStore
from core.settings import Settings
from tests.unit.catalog.scan.folders import write_json, write_model


class Room:
    """A model folder whose scans are counted, with the time of the test's choice."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, starters=False, discover=[], formats=["safetensors"])
        self.store = CatalogStore(self.settings.catalog_file)
        self.backends = [load_backends()["safetensors"]]
        self.now = time.time() + 100
        self.last = LastScan(lambda: self.now)

    @property
    def models(self) -> Path:
        return self.settings.home / "models"

    def scan(self) -> ScanReport:
        return scan(
            self.settings, self.store, self.backends, clock=lambda: self.now, last=self.last
        )


@pytest.fixture
def room(tmp_path: Path) -> Room:
    room = Room(tmp_path / "home")
    write_model(room.models / "one")
    write_model(room.models / "deep" / "two")
    write_json(room.models / "one" / "more.json", {})
    (room.models / "one" / "half.safetensors.part").write_bytes(b"x")
    return room


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The scans that looked at files."""
    seen: list[int] = []

    def count(roots: Sequence[Path]) -> WalkResult:
        seen.append(1)
        return walk(roots)

    monkeypatch.setattr(module, "walk", count)
    return seen


def test_nothing_is_read_while_nothing_changes(
    room: Room, walks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = room.scan()
    assert len(first.added) == 2

    opens = Path.open

    def refuse(*arguments: Any, **options: Any) -> Any:
        path = arguments[0]
        # The folders that were added at run time stand in a file.
        if isinstance(path, Path) and path.name == "model_folders.json":
            return opens(*arguments, **options)
        raise AssertionError(f"{path} was read")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(Path, "open", refuse)
        patch.setattr(CatalogStore, "models", refuse)
        again = room.scan()
    assert len(walks) == 1
    assert not again.has_changes
    assert (again.folders, again.skipped) == (first.folders, first.skipped)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def swap(path: Path) -> None:
    """Replace a file by another one of the same size and time."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"x" * status.st_size)
    os.utime(other, ns=(0, status.st_mtime_ns))
    other.replace(path)


def grow(path: Path) -> None:
    path.write_text(path.read_text() + " ")


CHANGES: dict[str, Callable[[Room], object]] = {
    "added": lambda room: write_model(room.models / "three"),
    "added below": lambda room: write_json(room.models / "deep" / "two" / "x.json", {}),
    "removed": lambda room: (room.models / "one" / "more.json").unlink(),
    "a folder removed": lambda room: shutil.rmtree(room.models / "deep"),
    "touched": lambda room: touch(room.models / "one" / "model.safetensors"),
    "replaced": lambda room: swap(room.models / "one" / "model.safetensors"),
    "grown": lambda room: grow(room.models / "one" / "config.json"),
    "renamed": lambda room: (room.models / "one").rename(room.models / "won"),
    "no permission": lambda room: (room.models / "one" / "config.json").chmod(0o200),
    "a download": lambda room: (room.models / "one" / "half.safetensors.part").unlink(),
    "settings": lambda room: room.store.change_settings("one@safetensors-f32", {"pin": True}),
    "the folder itself": lambda room: room.models.rename(room.models.with_name("away")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(room: Room, walks: list[int], name: str) -> None:
    room.scan()
    room.scan()
    assert len(walks) == 1
    CHANGES[name](room)
    room.now += 10
    room.scan()
    assert len(walks) == 2


def test_what_changed_just_now_may_change_again_unseen(room: Room, walks: list[int]) -> None:
    """Two changes within one step of the file system's clock look like one."""
    room.now = time.time() + 1
    for _ in range(2):
        room.scan()
    assert len(walks) == 2
    room.now += 100
    for _ in range(3):
        room.scan()
    assert len(walks) == 3


def test_a_folder_that_is_not_there_is_seen_when_it_comes(
    room: Room, walks: list[int], tmp_path: Path
) -> None:
    room.settings = room.settings.model_copy(update={"models_path": [tmp_path / "usb"]})
    room.scan()
    room.scan()
    assert len(walks) == 1
    write_model(tmp_path / "usb" / "four")
    assert len(room.scan().added) == 1


def test_other_folders_are_scanned(room: Room, walks: list[int], tmp_path: Path) -> None:
    room.scan()
    write_model(tmp_path / "more" / "four")
    room.settings = room.settings.model_copy(update={"models_path": [tmp_path / "more"]})
    assert len(room.scan().added) == 1
    assert len(walks) == 2


def test_files_that_could_not_be_inspected_are_tried_again(room: Room, walks: list[int]) -> None:
    for _ in range(2):
        scan(
            room.settings,
            room.store,
            room.backends,
            clock=lambda: room.now,
            identify_file=lambda _: Uninspected("busy"),
            last=room.last,
        )
        room.now += 100
    assert len(walks) == 2


def test_a_new_target_of_a_link_is_seen(room: Room, walks: list[int], tmp_path: Path) -> None:
    blobs = room.models / "blobs"
    blobs.mkdir()
    blob = blobs / "weights"
    blob.write_bytes(b"1")
    (room.models / "one" / "link.txt").symlink_to(blob)
    room.scan()
    room.scan()
    assert len(walks) == 1
    other = tmp_path / "other"
    other.write_bytes(b"22")
    link = room.models / "one" / "link.txt"
    link.unlink()
    link.symlink_to(other)
    room.scan()
    assert len(walks) == 2
