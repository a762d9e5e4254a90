"""The Serve deployment of long jobs: one process that owns them, and goes on after its kill."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backends.registry import backends_for
from catalog.hub.client import HubClient
from catalog.hub.download.job import DownloadJob
from catalog.hub.fit import Room
from catalog.hub.token import TokenFile, check_token, current_token, owner_of
from catalog.job_store import JobStore
from catalog.jobs import ENDED, Job
from catalog.models import ModelRecord
from catalog.store import CatalogStore
from core.errors import BrokenModel, ImpetusError, RequestError, Unavailable
from core.settings import Settings
from core.supervision import Supervisor, call_in_thread
from deployments.jobs.downloads import KIND as DOWNLOAD
from deployments.jobs.downloads import DownloadJobs, is_there
from deployments.jobs.hub import HubReader
from deployments.jobs.limits import DownloadLimits, LimitsFile
from deployments.jobs.runner import JobRunner
from deployments.jobs.strain import StrainWatch
from deployments.jobs.views import detail_of, view_of
from deployments.messages import SchedulerSnapshot
from deployments.options import budget_bytes, engine_options
from deployments.serve.awake import keep_awake
from deployments.serve.handles import Handle, call, direct, returning_errors
from deployments.serve.worker import prepare_worker
from router.hub_service import (
    HubReadme,
    HubRepositoryAnswer,
    HubResults,
    HubSearch,
    HubTokenAnswer,
)
from router.job_service import DownloadLimitsView, JobDetail, JobView

logger = logging.getLogger(__name__)

_SCHEDULER_LIMIT_S = 5.0
# A scan of large folders may take long; the job is done all the same.
_SCAN_LIMIT_S = 60.0
# A scan lists no file that was written within the last 3 s.
_REGISTER_LIMIT_S = 15.0
_REGISTER_POLL_S = 1.0
_LOAD_LIMIT_S = 10.0
_SILENCE_S = 60.0


class JobsReplica:
    """Runs the jobs of `jobs.sqlite` in the home folder; see `router.job_service.Jobs`.

    All state belongs to one event loop; disks and networks are used on threads and in children.
    """

    def __init__(self, settings: Settings, scheduler: Handle) -> None:
        prepare_worker()
        self._settings = settings
        self._scheduler = direct(scheduler)
        self._token_file = TokenFile(settings.home)
        self._downloads = DownloadJobs(self._token, self._register)
        self._limits_file = LimitsFile(settings.home / "download_limits.json")
        self._limits = DownloadLimits()
        self._strain = StrainWatch(scheduler, {DOWNLOAD})
        self._hub = HubReader(
            backends_for(settings.formats),
            engine_options(settings, budget_bytes(settings)),
            settings.home / "models" / "hub",
            self._room,
            lambda: HubClient(token=self._token()),
        )
        self._catalog: CatalogStore | None = None
        self._runner: JobRunner | None = None
        self._problem = "The stored jobs are being read."
        self._has_runner = asyncio.Event()
        self._supervisor = Supervisor()
        watched = replace(self._supervisor.policy, silence_s=_SILENCE_S, is_vital=False)
        # A store that cannot be opened is tried again; everything else is served meanwhile.
        passing = replace(self._supervisor.policy, is_vital=False)
        self._supervisor.keep_running("jobs", self._run, passing)
        self._supervisor.keep_running("strain watch", self._strain.run, watched)
        keep_awake(
            self._supervisor, settings, lambda: bool(self._runner and self._runner.is_working)
        )

    async def _run(self) -> None:
        """Open the store and run its jobs until cancelled.  Raises what the store does."""
        path = self._settings.home / "jobs.sqlite"
        try:
            store = await call_in_thread("impetus-jobs", lambda: JobStore(path))
        except ImpetusError as problem:
            self._problem = problem.message
            raise
        try:
            handlers = {DOWNLOAD: self._downloads}
            self._use(await call_in_thread("impetus-limits", self._limits_file.read))
            runner = JobRunner(
                store,
                handlers,
                lambda: self._limits.applied_to(self._strain.limits(handlers), DOWNLOAD),
            )
            self._runner = runner
            self._has_runner.set()
            await runner.run()
        except ImpetusError as problem:
            self._problem = problem.message
            raise
        finally:
            self._runner = None
            self._has_runner.clear()
            store.close()

    def _token(self) -> str:
        """Return the user's token for the hub; blocks."""
        return current_token(self._token_file).value

    async def _loaded(self) -> JobRunner:
        """Return the runner once it knows the stored jobs.  Raises Unavailable."""
        try:
            async with asyncio.timeout(_LOAD_LIMIT_S):
                await self._has_runner.wait()
                if self._runner is not None:
                    await self._runner.wait_until_loaded()
        except TimeoutError:
            raise Unavailable(self._problem, retry_after_s=5) from None
        if self._runner is None:
            raise Unavailable(self._problem, retry_after_s=5)
        return self._runner

    async def _room(self) -> Room:
        """Return the memory that is free now.  Raises Unavailable."""
        try:
            async with asyncio.timeout(_SCHEDULER_LIMIT_S):
                found: SchedulerSnapshot = await call(self._scheduler.snapshot.remote())
        except (ImpetusError, TimeoutError) as problem:
            raise Unavailable(
                "The scheduler does not tell how much memory is free; try again.", retry_after_s=5
            ) from problem
        return Room(found.budget_bytes, found.budget_bytes - found.used_bytes)

    async def _register(self, folder: Path) -> None:
        """Have the folders scanned until the catalog has the model; else a later scan finds it.

        Raises BrokenModel if the scan refused all that is in the folder.
        """
        end = time.monotonic() + _REGISTER_LIMIT_S
        while True:
            await self._rescan(folder)
            found = await call_in_thread("impetus-catalog", lambda: self._records_in(folder))
            if found or time.monotonic() >= end:
                break
            await asyncio.sleep(_REGISTER_POLL_S)
        if found and all(record.state == "refused" for record in found):
            raise BrokenModel(f"{folder.name} cannot be used here: {found[0].reason}")

    async def _rescan(self, folder: Path) -> None:
        try:
            async with asyncio.timeout(_SCAN_LIMIT_S):
                await call(self._scheduler.rescan.remote())
        except (ImpetusError, TimeoutError) as problem:
            logger.warning("the folders are not scanned for %s yet: %r", folder.name, problem)

    def _records_in(self, folder: Path) -> list[ModelRecord]:
        """Return what the catalog has of a download's folder; blocks."""
        real = os.path.realpath(folder)
        try:
            if self._catalog is None:
                self._catalog = CatalogStore(self._settings.catalog_file)
            records = self._catalog.models()
        except ImpetusError as problem:
            logger.warning("the catalog cannot be read: %s", problem.message)
            return []
        return [record for record in records if Path(record.key).is_relative_to(real)]

    async def check_health(self) -> None:
        """Raise Unavailable if a background task keeps failing: Serve replaces this process."""
        self._supervisor.check_health()

    @returning_errors
    async def jobs(self) -> list[JobView]:
        """Return all jobs in the order of the queue."""
        runner = await self._loaded()
        return [self._view(runner, job) for job in runner.jobs()]

    @returning_errors
    async def job(self, job_id: str) -> JobDetail:
        """Return a job.  Raises NotFound."""
        runner = await self._loaded()
        return await self._detail(runner, runner.job(job_id))

    @returning_errors
    async def pause(self, job_id: str) -> JobDetail:
        """Stop a job and keep what is done.  Raises NotFound, RequestError."""
        return await self._changed(lambda runner: runner.pause(job_id))

    @returning_errors
    async def resume(self, job_id: str) -> JobDetail:
        """Put a paused or failed job back into the queue.  Raises NotFound, RequestError."""
        return await self._changed(lambda runner: runner.resume(job_id))

    @returning_errors
    async def cancel(self, job_id: str) -> JobDetail:
        """Stop a job and remove what is done.  Raises NotFound, RequestError."""
        return await self._changed(lambda runner: runner.cancel(job_id))

    @returning_errors
    async def move(self, job_id: str, before: str) -> JobDetail:
        """Put a job before another one, or at the end.  Raises NotFound, RequestError."""
        return await self._changed(lambda runner: runner.move(job_id, before))

    @returning_errors
    async def download(self, model: str, revision: str, entry: str) -> JobDetail:
        """Return the job of a download; see `router.job_service.Jobs`."""
        await self._loaded()
        wanted = await self._hub.plan(model, revision, entry)
        await call_in_thread("impetus-target", lambda: _prepare(wanted))
        return await self._changed(lambda runner: _add(runner, wanted))

    @returning_errors
    async def limits(self) -> DownloadLimitsView:
        """Return the limits of downloads."""
        await self._loaded()
        return DownloadLimitsView(**asdict(self._limits))

    @returning_errors
    async def change_limits(self, changes: Mapping[str, Any]) -> DownloadLimitsView:
        """Change limits, None meaning the usual one; downloads that run go on with them.

        Raises RequestError.
        """
        runner = await self._loaded()
        usual = asdict(DownloadLimits())
        wanted = {key: usual[key] if value is None else value for key, value in changes.items()}
        limits = replace(self._limits, **wanted)
        limits.check()
        await call_in_thread("impetus-limits", lambda: self._limits_file.write(limits))
        is_other_speed = limits.share_bytes_per_s != self._limits.share_bytes_per_s
        self._use(limits)
        if is_other_speed:
            runner.restart(DOWNLOAD, "its limits have changed")
        runner.look_again()
        return DownloadLimitsView(**asdict(limits))

    def _use(self, limits: DownloadLimits) -> None:
        self._limits = limits
        self._downloads.limit_bytes_per_s = limits.share_bytes_per_s

    @returning_errors
    async def search(self, wanted: HubSearch) -> HubResults:
        """Return results of a search; see `router.hub_service.Hub`."""
        return await self._hub.search(wanted)

    @returning_errors
    async def repository(
        self, name: str, revision: str, context_tokens: int
    ) -> HubRepositoryAnswer:
        """Return a repository with what fits; see `router.hub_service.Hub`."""
        return await self._hub.repository(name, revision, context_tokens)

    @returning_errors
    async def readme(self, name: str, revision: str) -> HubReadme:
        """Return the README of a repository."""
        return HubReadme(markdown=await self._hub.readme(name, revision))

    @returning_errors
    async def token(self) -> HubTokenAnswer:
        """Return which token for the hub is in use."""
        found = await call_in_thread("impetus-token", lambda: current_token(self._token_file))
        return HubTokenAnswer(source=found.source)

    @returning_errors
    async def store_token(self, token: str) -> HubTokenAnswer:
        """Store a token once the hub has said whose it is; see `router.hub_service.Hub`."""

        def store() -> HubTokenAnswer:
            check_token(token)
            owner = owner_of(HubClient(token=token.strip()))
            self._token_file.save(token)
            return HubTokenAnswer(source=current_token(self._token_file).source, owner=owner)

        return await call_in_thread("impetus-token", store)

    @returning_errors
    async def remove_token(self) -> HubTokenAnswer:
        """Forget the stored token; return which one is in use then."""

        def remove() -> HubTokenAnswer:
            self._token_file.remove()
            return HubTokenAnswer(source=current_token(self._token_file).source)

        return await call_in_thread("impetus-token", remove)

    async def _changed(self, change: Callable[[JobRunner], Job]) -> JobDetail:
        """Change a job and answer once that is stored."""
        runner = await self._loaded()
        job = change(runner)
        await runner.save()
        return await self._detail(runner, job)

    def _view(self, runner: JobRunner, job: Job) -> JobView:
        return view_of(job, self._downloads.progress.get(job.id), runner.held_back(job))

    async def _detail(self, runner: JobRunner, job: Job) -> JobDetail:
        found: list[ModelRecord] = []
        if job.state == "done":
            folder = DownloadJob.from_json(job.work).target
            found = await call_in_thread("impetus-catalog", lambda: self._records_in(folder))
        return detail_of(job, self._view(runner, job), tuple(record.id for record in found))

    def __del__(self) -> None:
        """Cancel all tasks; the children end with this process."""
        if hasattr(self, "_supervisor"):
            self._supervisor.cancel()
        if hasattr(self, "_catalog") and self._catalog is not None:
            self._catalog.close()


def _prepare(wanted: DownloadJob) -> None:
    """Make the folder around the target; blocks.

    Raises RequestError if the target is there with something else, ImpetusError for the disk.
    """
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


def _add(runner: JobRunner, wanted: DownloadJob) -> Job:
    """Return a new job, or the one that downloads the same model already."""
    for job in runner.jobs():
        if job.kind == DOWNLOAD and job.state not in ENDED:
            other = DownloadJob.from_json(job.work)
            if other.target == wanted.target:
                return job
    return runner.add(DOWNLOAD, _title(wanted), wanted.to_json())


def _title(wanted: DownloadJob) -> str:
    return wanted.target.name if wanted.url else f"{wanted.repository}: {wanted.files[0].path}"
