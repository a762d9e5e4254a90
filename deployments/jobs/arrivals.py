"""The jobs that take uploaded and imported models, and the uploads that were given up."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from catalog.added_folders import add_folder, remove_folder
from catalog.jobs import ENDED, Job
from catalog.models import ModelRecord
from catalog.scan.places import model_folders
from catalog.uploads.arrival import Arrival
from catalog.uploads.browse import roots
from catalog.uploads.run import discard, run_arrival
from catalog.uploads.store import UploadStore
from core.errors import BrokenModel
from core.settings import Settings
from core.supervision import call_in_thread
from deployments.jobs.kind import NO_ACTIVITY, Activity, ids_of
from deployments.jobs.runner import JobRunner, Report
from router.job_service import JobDetail, JobFile, JobView

logger = logging.getLogger(__name__)

UPLOAD = "upload"
IMPORT = "import"
KINDS = (UPLOAD, IMPORT)
_SWEEP_S = 24 * 3600.0


class ArrivalJobs:
    """Checks, inspects and publishes a model as the work of a job tells.

    `register` is awaited with its folder before the job is done; BrokenModel from it, as from the
    inspection, removes what was uploaded or copied.
    """

    def __init__(self, settings: Settings, register: Callable[[Path], Awaitable[None]]) -> None:
        self._settings = settings
        self._register = register

    async def run(self, job: Job, report: Report) -> None:
        """Take the model; see `JobHandler`."""
        arrival = Arrival.from_json(job.work)
        home = self._settings.home
        folder = arrival.folder(home)
        is_new = arrival.how == "in_place" and not await call_in_thread(
            "impetus-folders", lambda: self._is_scanned(folder)
        )
        sources = await call_in_thread("impetus-roots", lambda: roots(self._settings))
        try:
            await run_arrival(arrival, home, self._settings.formats, sources, report)
            if is_new:
                await asyncio.to_thread(add_folder, self._settings, folder)
            await self._register(folder)
        except BrokenModel:
            if is_new:
                await asyncio.to_thread(remove_folder, self._settings, folder)
            await asyncio.to_thread(discard, arrival, home, with_model=True)
            raise
        await asyncio.to_thread(discard, arrival, home)

    def _is_scanned(self, folder: Path) -> bool:
        folders = model_folders(self._settings)
        return any(folder.is_relative_to(one.resolve()) for one in folders)

    async def discard(self, job: Job) -> None:
        """Remove what has arrived."""
        await asyncio.to_thread(discard, Arrival.from_json(job.work), self._settings.home)

    def activity(self, job: Job) -> Activity:
        """Return nothing: how much is done stands in the job; see `JobKind`."""
        del job
        return NO_ACTIVITY

    def folder(self, job: Job) -> Path:
        """Return the folder in which the model is served."""
        return Arrival.from_json(job.work).folder(self._settings.home)

    def detail(self, job: Job, view: JobView, found: Sequence[ModelRecord]) -> JobDetail:
        """Return an upload or import with its files."""
        arrival = Arrival.from_json(job.work)
        return JobDetail(
            **view.model_dump(),
            folder=str(self.folder(job)),
            files=tuple(
                JobFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
                for file in arrival.files
            ),
            model_ids=ids_of(found),
        )


def active_arrivals(jobs: Iterable[Job]) -> dict[str, Job]:
    """Return the jobs of uploads and imports that are not over, by the id of their folder."""
    return {
        Arrival.from_json(job.work).id: job
        for job in jobs
        if job.kind in KINDS and job.state not in ENDED
    }


def add_arrival(runner: JobRunner, kind: str, wanted: Arrival) -> Job:
    """Return a new job, or the one that takes the same model already."""
    for job in active_arrivals(runner.jobs()).values():
        other = Arrival.from_json(job.work)
        is_same = (other.source, other.how) == (wanted.source, wanted.how) and kind == IMPORT
        if job.kind == kind and (other.id == wanted.id or is_same):
            return job
    return runner.add(kind, wanted.name, wanted.to_json())


async def sweep_uploads(store: UploadStore, jobs: Callable[[], Awaitable[Iterable[Job]]]) -> None:
    """Remove uploads to which nothing was added for a week: at once, then daily, until cancelled.

    Raises what `jobs` does.
    """
    while True:
        sweep = partial(store.sweep, set(active_arrivals(await jobs())), time.time())
        removed = await call_in_thread("impetus-sweep", sweep)
        if removed:
            logger.info("uploads that were given up are removed: %s", ", ".join(removed))
        await asyncio.sleep(_SWEEP_S)
