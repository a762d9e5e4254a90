"""Waiting for changes of model folders by the system's own events."""

import itertools
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from catalog.scan.watch import FolderWatch

LIMIT_S = 30.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    # Hidden folders above a root do not matter.
    folder = tmp_path / ".lmstudio" / "models"
    (folder / "inner").mkdir(parents=True)
    return folder


def ticks(count: int) -> Callable[[], float]:
    """Return a clock that is past the limit after it was read `count` times."""
    numbers = itertools.count()
    return lambda: 0.0 if next(numbers) < count else 2 * LIMIT_S


@pytest.mark.parametrize("name", ["new.gguf", "inner/new.gguf", "later/deep/new.gguf"])
def test_a_new_file_is_seen_wherever_it_is(root: Path, name: str) -> None:
    watch = FolderWatch([root, root / "none"], step_ms=5)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"x")
    assert watch.wait(LIMIT_S, time.monotonic)
    watch.stop()


def test_changed_moved_and_deleted_files_are_seen(root: Path) -> None:
    file = root / "a.gguf"
    file.write_bytes(b"x")
    watch = FolderWatch([root], step_ms=5)
    for change in (
        lambda: file.write_bytes(b"longer"),
        lambda: file.rename(root / "b.gguf"),
        (root / "b.gguf").unlink,
    ):
        change()
        assert watch.wait(LIMIT_S, time.monotonic)
    watch.stop()


def test_what_scans_ignore_is_not_told(root: Path) -> None:
    watch = FolderWatch([root], step_ms=5)
    (root / ".impetus-bin").mkdir()
    for name in (".impetus-bin/a.gguf", ".x.partial-1-00000000", "a.gguf.part", "b.incomplete"):
        (root / name).write_bytes(b"x")
    # Reading is no change.
    list(root.iterdir())
    assert not watch.wait(LIMIT_S, ticks(30))
    watch.stop()


def test_a_stop_ends_the_wait_of_another_thread(root: Path) -> None:
    watch = FolderWatch([root], step_ms=5)
    ended = threading.Event()
    results: list[bool] = []

    def wait() -> None:
        results.append(watch.wait(3600, time.monotonic))
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    watch.stop()
    assert ended.wait(LIMIT_S)
    assert results == [False]
    assert not watch.wait(LIMIT_S, time.monotonic)


def test_folders_that_come_go_or_are_made_anew_are_others(root: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    watch = FolderWatch([root, later, root], step_ms=5)
    assert watch.covers([root, later])
    later.mkdir()
    assert not watch.covers([root, later])
    assert watch.covers([root])
    root.rename(tmp_path / "moved")
    root.mkdir()
    assert not watch.covers([root])
    watch.stop()


def test_a_folder_that_was_deleted_and_made_again_at_once_is_another(root: Path) -> None:
    """File systems use the number of the deleted folder again: it looks the same."""
    watch = FolderWatch([root], step_ms=5)
    shutil.rmtree(root)
    root.mkdir()
    assert watch.wait(LIMIT_S, time.monotonic)
    assert not watch.covers([root])
    watch.stop()


def test_nothing_to_watch_waits_for_the_limit(tmp_path: Path) -> None:
    watch = FolderWatch([tmp_path / "none"])
    assert not watch.wait(0.001, time.monotonic)
    watch.stop()
