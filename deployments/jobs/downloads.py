"""The jobs that download models."""

import asyncio
import os
from collections.abc import Callable

from catalog.hub.download.job import DownloadJob
from catalog.hub.download.record import read_record
from catalog.hub.download.run import DownloadProgress, discard, run_download
from catalog.jobs import Job
from deployments.jobs.runner import Report

KIND = "download"


class DownloadJobs:
    """Downloads what the work of a job tells; `token` is read at each start.

    `on_progress` is told the speed and the remaining time by the job's id.
    """

    def __init__(
        self,
        token: Callable[[], str],
        on_progress: Callable[[str, DownloadProgress], None] = lambda _id, _progress: None,
    ) -> None:
        self._token = token
        self._on_progress = on_progress

    async def run(self, job: Job, report: Report) -> None:
        """Download the model; see `JobHandler`."""
        wanted = DownloadJob.from_json(job.work)

        def tell(progress: DownloadProgress) -> None:
            report(progress.done_bytes, progress.total_bytes)
            self._on_progress(job.id, progress)

        if await asyncio.to_thread(_is_there, wanted):
            report(wanted.size_bytes, wanted.size_bytes)
            return
        token = await asyncio.to_thread(self._token)
        await run_download(wanted, token, tell)

    async def discard(self, job: Job) -> None:
        """Remove what has arrived."""
        await asyncio.to_thread(discard, DownloadJob.from_json(job.work))


def _is_there(wanted: DownloadJob) -> bool:
    """Whether the model is complete: its process may have ended before that was stored."""
    if not os.path.lexists(wanted.target):
        return False
    record = read_record(wanted.target)
    return record is not None and (
        (record.repository, record.commit, record.url)
        == (wanted.repository, wanted.commit, wanted.url)
        and record.hashes.keys() == {file.path for file in wanted.files}
    )
