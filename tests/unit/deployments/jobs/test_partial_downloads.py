"""Unfinished downloads: which are listed, which are kept for their jobs, and when they go (D14)."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from catalog.hub.download.job import DownloadJob, lock_path
from catalog.jobs import Job, JobState
from core.errors import NotFound
from core.files import lock_file
from deployments.jobs import partials as module
from deployments.jobs.partials import KEPT_DAYS, Partials

NOW = 1_800_000_000.0
DAY_S = 86_400.0


class Shelf:
    """Unfinished downloads of some age, with the jobs that the test gives them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Job] | None = []
        self.now = NOW
        self.partials = Partials(folder, self.known, lambda: self.now)

    def known(self) -> Sequence[Job] | None:
        return self.jobs

    def add(self, name: str, days: float = 0.0, state: JobState | None = None) -> DownloadJob:
        job = DownloadJob("", "org/tiny", "c" * 40, (), self.folder / name)
        lock = lock_path(job.work)
        lock.parent.mkdir(parents=True)
        lock.touch()
        part = lock.with_name("x.part")
        part.write_bytes(b"12345")
        for path in (part, lock):
            os.utime(path, (NOW - days * DAY_S,) * 2)
        if state is not None:
            assert self.jobs is not None
            self.jobs.append(Job(name, "download", name, job.to_json(), 0.0, 0.0, state=state))
        return job

    async def ids(self) -> list[str]:
        return [one.id for one in await self.partials.listed()]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "hub")


async def test_what_no_job_goes_on_with_is_listed_with_its_size_d14(shelf: Shelf) -> None:
    shelf.add("org/old", days=3)
    shelf.add("single", days=5, state="cancelled")
    shelf.add("org/failed", days=1, state="failed")
    for state in ("queued", "running", "paused", "waiting", "interrupted"):
        shelf.add(f"org/{state}", days=9, state=state)
    (shelf.folder / "org" / "whole").mkdir()
    single, old, failed = await shelf.partials.listed()
    assert [single.id, old.id, failed.id] == ["single", "org/old", "org/failed"]
    assert old.size_bytes == 5
    assert old.changed_at == NOW - 3 * DAY_S
    assert old.removed_at == NOW + (KEPT_DAYS - 3) * DAY_S


async def test_one_is_removed_unless_a_job_goes_on_with_it_d14(shelf: Shelf) -> None:
    gone = shelf.add("org/gone")
    paused = shelf.add("org/paused", state="paused")
    running = shelf.add("org/running")
    with lock_path(running.work).open("w") as lock:
        lock_file(lock, 0.0)
        for partial_id in ("org/paused", "org/running", "org/none", "../hub/org/gone", "", "/"):
            with pytest.raises(NotFound):
                await shelf.partials.remove(partial_id)
    await shelf.partials.remove("org/gone")
    assert not gone.work.exists()
    assert paused.work.exists()
    assert running.work.exists()


async def test_old_ones_go_by_themselves_once_the_jobs_are_known_d14(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "beat", lambda: None)
    old = shelf.add("org/old", days=KEPT_DAYS + 0.1)
    young = shelf.add("org/young", days=KEPT_DAYS - 0.1)
    paused = shelf.add("org/paused", days=99, state="paused")
    known, shelf.jobs = shelf.jobs, None
    pause = asyncio.sleep
    looks = 0

    async def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            # Before, nobody could tell whose they are.
            assert old.work.exists()
            shelf.jobs = known
        await pause(0)

    monkeypatch.setattr("deployments.jobs.partials.asyncio.sleep", sleep)
    task = asyncio.create_task(shelf.partials.run())
    while old.work.exists():
        await pause(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert looks >= 3
    assert young.work.exists()
    assert paused.work.exists()
