"""The jobs that download models."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from catalog.hub.client import HubClient
from catalog.hub.download.job import RECORD, DownloadJob
from catalog.hub.download.record import has_size, read_record, without_secrets
from catalog.hub.download.run import DownloadProgress, discard, run_download
from catalog.jobs import ENDED, Job
from catalog.models import ModelRecord
from core.errors import BrokenModel, ImpetusError, RequestError
from core.units import MIB
from deployments.jobs.kind import NO_ACTIVITY, Activity, ids_of
from deployments.jobs.runner import JobRunner, Report
from router.job_service import JobDetail, JobFile, JobView

KIND = "download"
# Models work without smaller files, such as a README, but not without weights.
_LARGE_BYTES = MIB


async def _ignore(_: Path) -> None:
    pass


class DownloadJobs:
    """Downloads what the work of a job tells; `token` is read at each start.

    `progress` is how far each running download is, by the job's id.  `on_arrived` is awaited with
    the folder of a model that is complete, before its job is done; BrokenModel from it removes the
    folder, if this run made it.  `limit_bytes_per_s` is that of all downloads together, 0: none.
    `private_hosts` are those of `UrlSource`.
    """

    def __init__(
        self,
        token: Callable[[], str],
        on_arrived: Callable[[Path], Awaitable[None]] = _ignore,
        private_hosts: Sequence[str] = (),
    ) -> None:
        self._token = token
        self._on_arrived = on_arrived
        self._private_hosts = tuple(private_hosts)
        self.limit_bytes_per_s = 0
        self.progress: dict[str, DownloadProgress] = {}
        self._running: dict[str, DownloadJob] = {}

    def share_bytes_per_s(self) -> int:
        """Return what each download that runs may fetch in a second now, 0 for no limit."""
        limit = self.limit_bytes_per_s
        return max(limit // max(len(self._running), 1), 1) if limit else 0

    async def run(self, job: Job, report: Report) -> None:
        """Download the model; see `JobHandler`."""
        wanted = DownloadJob.from_json(job.work)

        def tell(progress: DownloadProgress) -> None:
            report(progress.done_bytes, progress.total_bytes)
            self.progress[job.id] = progress

        is_old = await asyncio.to_thread(is_there, wanted)
        if is_old:
            report(wanted.size_bytes, wanted.size_bytes)
        else:
            token = await asyncio.to_thread(self._token) if _is_for(wanted) else ""
            beside = tuple(self._running.values())
            self._running[job.id] = wanted
            try:
                limited = replace(
                    wanted,
                    limit_bytes_per_s=self.share_bytes_per_s(),
                    private_hosts=self._private_hosts,
                )
                await run_download(
                    limited, token, tell, limit=self.share_bytes_per_s, beside=beside
                )
            finally:
                del self._running[job.id]
                self.progress.pop(job.id, None)
        try:
            await self._on_arrived(wanted.target)
        except BrokenModel:
            # What was there before is the user's to remove.
            if not is_old:
                await asyncio.to_thread(shutil.rmtree, wanted.target, ignore_errors=True)
            raise

    async def discard(self, job: Job) -> None:
        """Remove what has arrived."""
        await asyncio.to_thread(discard, DownloadJob.from_json(job.work))

    def activity(self, job: Job) -> Activity:
        """Return what a download does; see `JobKind`."""
        progress = self.progress.get(job.id)
        if progress is None:
            return NO_ACTIVITY
        return Activity(
            progress.reason,
            bytes_per_s=progress.speed,
            remaining_s=progress.remaining_s,
            stalled_s=progress.stalled_s,
        )

    def folder(self, job: Job) -> Path:
        """Return the folder of the downloaded model."""
        return DownloadJob.from_json(job.work).target

    def detail(self, job: Job, view: JobView, found: Sequence[ModelRecord]) -> JobDetail:
        """Return a download with what it fetches."""
        wanted = DownloadJob.from_json(job.work)
        return JobDetail(
            **view.model_dump(),
            repository="" if wanted.url else wanted.repository,
            commit=wanted.commit,
            url=without_secrets(wanted.url),
            folder=str(wanted.target),
            files=tuple(
                JobFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
                for file in wanted.files
            ),
            model_ids=ids_of(found),
        )


def _is_for(wanted: DownloadJob) -> bool:
    """Whether the user's token is for the hub of a download, which may be one used before."""
    return not wanted.url and wanted.endpoint == HubClient(token="").endpoint


def is_there(wanted: DownloadJob) -> bool:
    """Whether the model is complete: its process may have ended before that was stored."""
    if not os.path.lexists(wanted.target):
        return False
    record = read_record(wanted.target)
    return record is not None and (
        (record.repository, record.commit, without_secrets(record.url))
        == (wanted.repository, wanted.commit, without_secrets(wanted.url))
        and record.hashes.keys() == {file.path for file in wanted.files}
        and all(has_size(wanted.target / file.path, file.size_bytes) for file in wanted.files)
    )


def _has_lost_files(wanted: DownloadJob) -> bool:
    """Whether the target is what is left of the same repository, without weights that it had.

    A folder with anything else in it, or with a large file of another size, is the user's.
    """
    record = read_record(wanted.target)
    if record is None or record.repository != wanted.repository:
        return False
    large = {path: size for path, size in record.sizes.items() if size >= _LARGE_BYTES}
    found = {
        path.relative_to(wanted.target).as_posix()
        for path in wanted.target.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    is_whole = all(has_size(wanted.target / path, large[path]) for path in found & large.keys())
    is_known = found <= {*record.sizes, RECORD, ".DS_Store"}
    return is_known and is_whole and not large.keys() <= found


def prepare(wanted: DownloadJob) -> None:
    """Make the folder around the target; blocks.

    What is left of a model of the same repository that lost large files becomes an unfinished
    download.  Raises RequestError if the target is there with something else, ImpetusError for the
    disk.
    """
    if _has_lost_files(wanted) and not os.path.lexists(wanted.work):
        wanted.target.rename(wanted.work)
    if wanted.target.exists() and not is_there(wanted):
        raise RequestError(
            f"{wanted.target} is there, but has another revision, or lacks files of "
            f"{wanted.repository}, or has others; delete the model, or move it away first.",
            param="model",
        )
    try:
        wanted.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ImpetusError(
            f"{wanted.target.parent} cannot be created ({problem.strerror}); make the folder "
            "writable."
        ) from problem


def add_download(runner: JobRunner, wanted: DownloadJob) -> Job:
    """Return a new job, or the one that downloads the same model already."""
    for job in runner.jobs():
        if job.kind == KIND and job.state not in ENDED:
            other = DownloadJob.from_json(job.work)
            if other.target == wanted.target:
                return job
    return runner.add(KIND, _title(wanted), wanted.to_json())


def _title(wanted: DownloadJob) -> str:
    return wanted.target.name if wanted.url else f"{wanted.repository}: {wanted.files[0].path}"
