"""Unfinished downloads that no job goes on with: lists them, and removes those that are old."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from catalog.hub.download.job import DownloadJob
from catalog.hub.download.run import PartialDownload, discard_partial, partial_downloads
from catalog.jobs import ENDED, Job
from core.errors import NotFound
from core.supervision import beat, call_in_thread
from router.job_service import PartialView

logger = logging.getLogger(__name__)

# Nothing was added to it for as long.
KEPT_DAYS = 14
_DAY_S = 86_400.0
_LOOK_S = 3600.0
# Shorter than the silence after which a task is started anew.
_STEP_S = 30.0


class Partials:
    """What has arrived of downloads below `folder` whose jobs are over, or gone.

    `jobs` returns the jobs of downloads, None while they are not known.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Callable[[], Sequence[Job] | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._jobs = jobs
        self._clock = clock

    async def listed(self) -> list[PartialView]:
        """Return them, the oldest first."""
        jobs = self._jobs() or ()
        found = await call_in_thread("impetus-partials", lambda: list(self._abandoned(jobs)))
        return [
            PartialView(
                id=self._id(one),
                size_bytes=one.size_bytes,
                changed_at=one.changed_s,
                removed_at=one.changed_s + KEPT_DAYS * _DAY_S,
            )
            for one in sorted(found, key=lambda one: one.changed_s)
        ]

    async def remove(self, partial_id: str) -> None:
        """Remove one.  Raises NotFound, also while a job goes on with it."""
        jobs = self._jobs() or ()

        def remove() -> bool:
            found = [one for one in self._abandoned(jobs) if self._id(one) == partial_id]
            return bool(found) and discard_partial(found[0])

        if not await call_in_thread("impetus-partials", remove):
            raise NotFound(
                f"There is no unfinished download {partial_id[:200]!r} that no job goes on with.",
                param="id",
            )

    async def run(self) -> None:
        """Remove old ones at the start and every hour, until cancelled."""
        due = 0.0
        while True:
            jobs = self._jobs()
            if jobs is not None and time.monotonic() >= due:
                await call_in_thread("impetus-partials", partial(self._reap, jobs))
                due = time.monotonic() + _LOOK_S
            beat()
            await asyncio.sleep(_STEP_S if due else 1.0)

    def _reap(self, jobs: Sequence[Job]) -> None:
        for one in self._abandoned(jobs):
            if self._clock() - one.changed_s > KEPT_DAYS * _DAY_S and discard_partial(one):
                logger.info(
                    "%s was removed: an unfinished download of %d bytes, to which nothing was "
                    "added for %d days",
                    self._id(one), one.size_bytes, KEPT_DAYS,
                )  # fmt: skip

    def _abandoned(self, jobs: Sequence[Job]) -> Iterator[PartialDownload]:
        """Yield those without a job that may go on; blocks while folders are listed."""
        wanted = {DownloadJob.from_json(job.work).work for job in jobs if job.state not in ENDED}
        # Models lie in the folders of their owners.
        folders = [self._folder, *(each for each in self._folder.glob("*") if each.is_dir())]
        for folder in folders:
            for one in partial_downloads(folder):
                if one.work not in wanted:
                    yield one

    def _id(self, one: PartialDownload) -> str:
        """Return the path of the model that it was to be, below the folder."""
        name = one.work.name.removeprefix(".").removesuffix(".download")
        return (one.work.relative_to(self._folder).parent / name).as_posix()
