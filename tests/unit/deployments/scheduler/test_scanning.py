"""The scanner: one scan at a time, few for unknown names, and none that a caller can break."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from catalog.models import ScanReport
from catalog.scan.identify import Outcome, Uninspected, examine
from catalog.scan.walk import modified_ns
from catalog.scan.watch import FolderWatch
from catalog.store import CatalogStore
from core.errors import Unavailable
from core.settings import Settings
from core.supervision import Supervisor
from deployments.messages import Residency
from deployments.scheduler import scanning
from deployments.scheduler.scanning import (
    ADDED_INTERVAL_S,
    RESCAN_INTERVAL_S,
    WATCHED_INTERVAL_S,
    Scanner,
)
from tests.clock import Clock
from tests.gguf_files import llama_gguf
from tests.unit.deployments.scheduler.scheduling import A, InProcess, Replica, started
from tests.waiting import wait_until


class Scans:
    """Stands in for the scan of the folders; blocks while the gate is closed."""

    def __init__(self) -> None:
        self.count = 0
        self.running = 0
        self.most = 0
        self.urgent: list[set[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.problem: Exception | None = None
        self.folders: list[Path] = []
        self.next_look_s: float | None = None

    def scan(self, *_: Any, urgent: Collection[str], **__: Any) -> ScanReport:
        self.count += 1
        self.urgent.append(set(urgent))
        # Before a test may see that the scan runs.
        folders = {path: modified_ns(path) for path in self.folders}
        self.running += 1
        self.most = max(self.most, self.running)
        self.gate.wait(30)
        self.running -= 1
        if self.problem is not None:
            raise self.problem
        return ScanReport(next_look_s=self.next_look_s, folders=folders)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Scans:
    scans = Scans()
    monkeypatch.setattr(scanning, "scan", scans.scan)
    return scans


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def scanner(tmp_path: Path, clock: Clock) -> AsyncIterator[Scanner]:
    store = CatalogStore(tmp_path / "catalog.sqlite")
    supervisor = Supervisor()
    yield Scanner(Settings(home=tmp_path), store, {}, supervisor, clock)
    await supervisor.stop()
    store.close()


async def test_unknown_names_scan_once_in_ten_seconds(
    scanner: Scanner, scans: Scans, clock: Clock
) -> None:
    await asyncio.gather(*(scanner.rescan() for _ in range(50)))
    for _ in range(50):
        await scanner.rescan()
    assert scans.count == 1
    clock.now += RESCAN_INTERVAL_S - 1
    await scanner.rescan()
    assert scans.count == 1
    clock.now += 1
    await scanner.rescan()
    assert scans.count == 2


async def test_an_unknown_name_scans_again_when_a_file_was_added(
    scanner: Scanner, scans: Scans, clock: Clock, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    scans.folders = [folder, tmp_path / "none"]
    await scanner.rescan()
    clock.now += ADDED_INTERVAL_S
    await scanner.rescan()
    assert scans.count == 1
    (folder / "new.gguf").write_text("x")
    os.utime(folder, (5, 5))
    await asyncio.gather(*(scanner.rescan() for _ in range(20)))
    assert scans.count == 2
    # Nothing else was added.
    for _ in range(20):
        await scanner.rescan()
    assert scans.count == 2
    (tmp_path / "none").mkdir()
    clock.now += ADDED_INTERVAL_S
    await scanner.rescan()
    assert scans.count == 3


async def test_a_disk_that_hangs_holds_one_look_and_no_request(
    scanner: Scanner, scans: Scans, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate, looks = threading.Event(), []

    def hang(folders: Any) -> bool:
        looks.append(folders)
        gate.wait(30)
        return False

    monkeypatch.setattr(scanning, "has_changed", hang)
    monkeypatch.setattr(scanning, "_LOOK_LIMIT_S", 0.01)
    scans.folders = [tmp_path]
    await scanner.rescan()
    await asyncio.wait_for(asyncio.gather(*(scanner.rescan() for _ in range(20))), 20)
    assert (scans.count, len(looks)) == (1, 1)
    gate.set()


async def test_files_that_are_arriving_are_looked_at_soon(scanner: Scanner, scans: Scans) -> None:
    scans.next_look_s = 0.0
    running = asyncio.ensure_future(scanner.run())
    # The interval between scans is a minute.
    await wait_until(lambda: scans.count >= 3, "arriving files are looked at again")
    scans.next_look_s = None
    await wait_until(lambda: scanner._report.next_look_s is None, "nothing is arriving")
    count = scans.count
    # A request's scan finds new arrivals; the loop looks at them without its minute.
    scans.next_look_s = 0.0
    await scanner.scan()
    await wait_until(lambda: scans.count >= count + 3, "new arrivals are looked at again")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_unknown_names_wait_for_the_scan_that_runs(scanner: Scanner, scans: Scans) -> None:
    scans.gate.clear()
    first = asyncio.ensure_future(scanner.rescan())
    await wait_until(lambda: scans.running, "the scan runs")
    others = [asyncio.ensure_future(scanner.rescan()) for _ in range(10)]
    await asyncio.sleep(0)
    assert not any(each.done() for each in others)
    scans.gate.set()
    await asyncio.gather(first, *others)
    assert scans.count == 1


async def test_a_file_that_the_running_scan_is_too_early_for_is_found(
    scanner: Scanner, scans: Scans, tmp_path: Path
) -> None:
    scans.folders = [tmp_path / "models"]
    scans.folders[0].mkdir()
    scans.gate.clear()
    first = asyncio.ensure_future(scanner.scan())
    await wait_until(lambda: scans.running, "the scan runs")
    (scans.folders[0] / "new.gguf").write_text("x")
    os.utime(scans.folders[0], (5, 5))
    others = [asyncio.ensure_future(scanner.rescan()) for _ in range(10)]
    await asyncio.sleep(0)
    scans.gate.set()
    await asyncio.gather(first, *others)
    assert (scans.count, scans.most) == (2, 1)


async def test_the_pause_begins_when_a_long_scan_ends(
    scanner: Scanner, scans: Scans, clock: Clock
) -> None:
    scans.gate.clear()
    first = asyncio.ensure_future(scanner.rescan())
    await wait_until(lambda: scans.running, "the scan runs")
    clock.now += 60
    scans.gate.set()
    await first
    await scanner.rescan()
    assert scans.count == 1


async def test_scans_that_something_else_needs_are_not_limited(
    scanner: Scanner, scans: Scans
) -> None:
    await scanner.rescan()
    await scanner.scan()
    await scanner.scan()
    assert scans.count == 3


async def test_a_caller_that_leaves_does_not_start_a_second_scan_beside_the_first(
    scanner: Scanner, scans: Scans
) -> None:
    scans.gate.clear()
    leaving = asyncio.ensure_future(scanner.scan())
    await wait_until(lambda: scans.running, "the scan runs")
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    later = asyncio.ensure_future(scanner.rescan())
    await asyncio.sleep(0)
    scans.gate.set()
    await later
    assert (scans.count, scans.most) == (1, 1)


async def test_a_scan_that_began_before_a_question_does_not_answer_it(
    scanner: Scanner, scans: Scans, clock: Clock
) -> None:
    scans.gate.clear()
    first = asyncio.ensure_future(scanner.scan())
    await wait_until(lambda: scans.running, "the scan runs")
    clock.now += 1
    second, third = (asyncio.ensure_future(scanner.scan()) for _ in range(2))
    await asyncio.sleep(0)
    scans.gate.set()
    await asyncio.gather(first, second, third)
    assert (scans.count, scans.most) == (2, 1)


async def test_a_file_that_a_request_waits_for_is_inspected_by_the_next_scan(
    scanner: Scanner, scans: Scans
) -> None:
    scans.problem = OSError("disk")
    await scanner.rescan("/m/a.gguf")
    await scanner.rescan("/m/b.gguf")
    assert scans.urgent == [{"/m/a.gguf"}]
    scans.problem = None
    await scanner.scan()
    await scanner.scan()
    assert scans.urgent == [{"/m/a.gguf"}, {"/m/a.gguf", "/m/b.gguf"}, set()]


async def test_a_hung_scan_hangs_nobody_else(
    scanner: Scanner, scans: Scans, tmp_path: Path
) -> None:
    scans.gate.clear()
    hung = asyncio.ensure_future(scanner.scan())
    await wait_until(lambda: scans.running, "the scan hangs")
    # The pool of threads is free: the scan has a thread of its own.
    assert await asyncio.wait_for(asyncio.to_thread(tmp_path.exists), 20)
    scans.gate.set()
    await hung


async def test_a_hung_scan_is_not_waited_for_for_ever(
    scanner: Scanner, scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_WAIT_LIMIT_S", 0.01)
    scans.gate.clear()
    await asyncio.wait_for(scanner.scan(0.01), 20)
    await asyncio.wait_for(scanner.scan(0.01), 20)
    await asyncio.wait_for(scanner.rescan(), 20)
    assert (scans.count, scans.most) == (1, 1)
    scans.gate.set()
    await scanner.scan(None)
    assert scans.most == 1


class Inspector(InProcess):
    """Fails to inspect while a test says so."""

    is_failing = True

    def examine(self, path: Path) -> Outcome:
        if self.is_failing:
            return Uninspected("the process that inspects files did not start (no memory)")
        return examine(path, self._backends)


@pytest.fixture
def inspector(monkeypatch: pytest.MonkeyPatch) -> type[Inspector]:
    monkeypatch.setattr("deployments.scheduler.scanning.Inspector", Inspector)
    monkeypatch.setattr(Inspector, "is_failing", False)
    return Inspector


async def test_a_load_inspects_a_file_whose_inspection_failed(
    tmp_path: Path, inspector: type[Inspector], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica()
    async with started(tmp_path, replica) as scheduler:
        inspector.is_failing = True
        llama_gguf(tmp_path / "models" / "a-F32.gguf", seed=7)
        await scheduler._scanner.scan()
        answer: Any = await scheduler.ensure_loaded(A)
        assert isinstance(answer, Unavailable)
        assert "no memory" in answer.message
        assert answer.retry_after_s
        inspector.is_failing = False
        monkeypatch.setattr(scheduler._scanner, "_next_rescan_at", 0.0)
        assert isinstance(await scheduler.ensure_loaded(A), Residency)


async def watching(scanner: Scanner, scans: Scans) -> "asyncio.Task[None]":
    """Start watching with short pauses; return once the first scan of the watch has ended."""
    task = asyncio.ensure_future(scanner.watch())
    await wait_until(lambda: scans.count and not scans.running, "the first scan")
    return task


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "CHANGED_INTERVAL_S", 0.01)
    monkeypatch.setattr(scanning, "FolderWatch", partial(FolderWatch, step_ms=10))


@pytest.mark.usefixtures("quick")
async def test_changed_files_are_scanned_and_unfinished_ones_are_not(
    scanner: Scanner, scans: Scans, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "inner"
    folder.mkdir(parents=True)
    task = await watching(scanner, scans)
    known = scans.count
    (folder / ".hidden").write_text("x")
    (folder / "new.gguf.part").write_text("x")
    (folder / "new.gguf").write_text("x")
    await wait_until(lambda: scans.count > known, "a scan for the new file")
    known = scans.count
    (folder / "new.gguf").unlink()
    await wait_until(lambda: scans.count > known, "a scan for the deleted file")
    task.cancel()
    await asyncio.wait({task})
    assert not scanner._is_watching


@pytest.mark.usefixtures("quick")
async def test_a_folder_that_is_made_later_is_watched_as_well(
    tmp_path: Path, scans: Scans, clock: Clock
) -> None:
    store, supervisor = CatalogStore(tmp_path / "catalog.sqlite"), Supervisor()
    settings = Settings(home=tmp_path, scan_interval_s=0.05)
    scanner = Scanner(settings, store, {}, supervisor, clock)
    task = await watching(scanner, scans)
    known = scans.count
    (tmp_path / "models").mkdir()
    await wait_until(lambda: scans.count > known, "a scan of the new folder")
    known = scans.count
    (tmp_path / "models" / "new.gguf").write_text("x")
    await wait_until(lambda: scans.count > known, "a scan for the new file")
    task.cancel()
    await asyncio.wait({task})
    await supervisor.stop()
    store.close()


async def test_watched_folders_are_scanned_only_when_something_is_due(
    scanner: Scanner, scans: Scans, clock: Clock, tmp_path: Path
) -> None:
    scans.folders = [tmp_path / "models"]
    await scanner.scan()
    assert not await scanner._is_idle()
    scanner._is_watching = True
    assert await scanner._is_idle()
    clock.now += WATCHED_INTERVAL_S
    assert not await scanner._is_idle()
    await scanner.scan()
    assert await scanner._is_idle()
    # What gave no event.
    (tmp_path / "models").mkdir()
    assert not await scanner._is_idle()
    scans.next_look_s = 1.0
    await scanner.scan()
    assert not await scanner._is_idle()


async def test_without_events_the_scans_at_intervals_go_on(
    scanner: Scanner,
    scans: Scans,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del scans

    def full(*_: Any) -> None:
        raise OSError(28, "OS file watch limit reached")

    monkeypatch.setattr(scanning, "FolderWatch", full)
    task = asyncio.ensure_future(scanner.watch())
    await wait_until(lambda: "cannot be watched" in caplog.text, "the reason is logged")
    assert not scanner._is_watching
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})
