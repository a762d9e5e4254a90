"""The Serve deployment of long jobs: one process that owns them, and goes on after its kill."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from backends.registry import backends_for
from catalog.convert.forecast import SpeedFile
from catalog.hub.client import HubClient
from catalog.hub.fit import Room
from catalog.hub.token import TokenFile, current_token
from catalog.job_store import JobStore
from catalog.jobs import Job
from catalog.uploads.arrival import arrival_of
from catalog.uploads.store import UploadStore
from core.errors import ImpetusError, Unavailable, UploadConflict
from core.settings import Settings
from core.supervision import Supervisor, call_in_thread
from deployments.jobs.arrivals import (
    IMPORT,
    KINDS,
    UPLOAD,
    ArrivalJobs,
    active_arrivals,
    add_arrival,
    sweep_uploads,
)
from deployments.jobs.catalog import CatalogReader
from deployments.jobs.conversion_requests import ConversionRequests
from deployments.jobs.conversions import KIND as CONVERSION
from deployments.jobs.conversions import ConversionJobs
from deployments.jobs.downloads import KIND as DOWNLOAD
from deployments.jobs.downloads import DownloadJobs, add_download, prepare
from deployments.jobs.feed import JobFeed
from deployments.jobs.hub import HubReader
from deployments.jobs.hub_calls import HubCalls
from deployments.jobs.limits import DownloadLimits, LimitsFile
from deployments.jobs.local_files import LocalFiles
from deployments.jobs.memory import MemoryLeases
from deployments.jobs.partials import Partials
from deployments.jobs.quality import QualityMeasurer
from deployments.jobs.runner import JobHandler, JobRunner
from deployments.jobs.strain import StrainWatch
from deployments.jobs.unrunnable import UnrunnableModels
from deployments.jobs.views import (
    conversion_activity,
    detail_of,
    download_activity,
    folder_of,
    view_of,
)
from deployments.messages import SchedulerSnapshot
from deployments.options import budget_bytes, engine_options
from deployments.serve.awake import keep_awake
from deployments.serve.handles import Handle, call, direct, returning_errors
from deployments.serve.worker import prepare_worker
from router.conversion_service import ConversionTargets, ConversionWish
from router.job_service import DownloadLimitsView, JobChanges, JobDetail, JobView, PartialView
from router.upload_service import FolderListing, ImportHow, ModelFolders

logger = logging.getLogger(__name__)

_SCHEDULER_LIMIT_S = 5.0
_LOAD_LIMIT_S = 10.0
_SILENCE_S = 60.0
# A router waits this long for a change of the jobs.
_CHANGES_LIMIT_S = 10.0


class JobsReplica(HubCalls):
    """Runs the jobs of `jobs.sqlite` in the home folder; see `router.job_service.Jobs`.

    All state belongs to one event loop; disks and networks are used on threads and in children.
    """

    def __init__(self, settings: Settings, scheduler: Handle) -> None:
        prepare_worker()
        self._settings = settings
        self._scheduler = direct(scheduler)
        self._token_file = TokenFile(settings.home)
        backends = backends_for(settings.formats)
        budget = budget_bytes(settings)
        options = engine_options(settings, budget)
        self._catalog = CatalogReader(settings.catalog_file, scheduler)
        self._downloads = DownloadJobs(self._token, self._catalog.register)
        self._arrivals = ArrivalJobs(settings, self._catalog.register)
        self._uploads = UploadStore(settings.home)
        self._files = LocalFiles(settings)
        speeds = SpeedFile(settings.home / "conversion_speeds.json")
        memory = MemoryLeases(scheduler)
        self._conversions = ConversionJobs(
            settings, self._catalog, memory, speeds, QualityMeasurer(memory, budget)
        )
        requests = ConversionRequests(settings, backends, self._catalog, speeds)
        self._conversion_requests = requests
        self._unrunnable = UnrunnableModels(
            settings, backends, options, self._catalog, self._conversions, requests, speeds
        )
        self._limits_file = LimitsFile(settings.home / "download_limits.json")
        self._limits = DownloadLimits()
        self._strain = StrainWatch(scheduler, {DOWNLOAD, *KINDS})
        self._hub = HubReader(
            backends,
            options,
            settings.home / "models" / "hub",
            self._room,
            lambda: HubClient(token=self._token()),
        )
        self._partials = Partials(settings.home / "models" / "hub", self._download_jobs)
        self._runner: JobRunner | None = None
        self._feed: JobFeed | None = None
        self._problem = "The stored jobs are being read."
        self._has_runner = asyncio.Event()
        self._supervisor = Supervisor()
        watched = replace(self._supervisor.policy, silence_s=_SILENCE_S, is_vital=False)
        # A store that cannot be opened is tried again; everything else is served meanwhile.
        passing = replace(self._supervisor.policy, is_vital=False)
        self._supervisor.keep_running("jobs", self._run, passing)
        self._supervisor.keep_running("strain watch", self._strain.run, watched)
        self._supervisor.keep_running("sweep of uploads", self._sweep, passing)
        self._supervisor.keep_running("unfinished downloads", self._partials.run, watched)
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
            handlers: dict[str, JobHandler] = {
                DOWNLOAD: self._downloads,
                CONVERSION: self._conversions,
                **dict.fromkeys(KINDS, self._arrivals),
            }
            await call_in_thread("impetus-sweep", self._conversions.sweep)
            self._use(await call_in_thread("impetus-limits", self._limits_file.read))
            feed = self._feed = JobFeed(
                lambda: [job.id for job in runner.jobs()],
                lambda job_id: self._view(runner, runner.job(job_id)),
            )
            runner = JobRunner(
                store,
                handlers,
                lambda: self._limits.applied_to(self._strain.limits(handlers), DOWNLOAD),
                on_change=lambda job: feed.touch(job.id),
                on_look=feed.touch_all,
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
            await self._conversions.close()
            store.close()

    def _download_jobs(self) -> list[Job] | None:
        """Return the jobs of downloads; None while the stored ones are being read."""
        if self._runner is None or not self._runner.is_loaded:
            return None
        return [job for job in self._runner.jobs() if job.kind == DOWNLOAD]

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

    async def check_health(self) -> None:
        """Raise Unavailable if a background task keeps failing: Serve replaces this process."""
        self._supervisor.check_health()

    @returning_errors
    async def jobs(self) -> list[JobView]:
        """Return all jobs in the order of the queue."""
        runner = await self._loaded()
        return [self._view(runner, job) for job in runner.jobs()]

    @returning_errors
    async def job_changes(self, known_version: int, limit_s: float) -> JobChanges:
        """Return the jobs that changed since a version, once one has, or after `limit_s`."""
        await self._loaded()
        feed = self._feed
        if feed is None:
            raise Unavailable(self._problem, retry_after_s=5)
        return await feed.wait(known_version, min(limit_s, _CHANGES_LIMIT_S))

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
        await call_in_thread("impetus-target", lambda: prepare(wanted))
        return await self._changed(lambda runner: add_download(runner, wanted))

    @returning_errors
    async def conversion_targets(self, model: str) -> ConversionTargets:
        """Return what a model can be converted to; see `router.conversion_service`."""
        return await self._conversion_requests.targets(model)

    @returning_errors
    async def convert(self, wish: ConversionWish) -> JobDetail:
        """Return the job of a conversion; see `router.conversion_service.Conversions`."""
        runner = await self._loaded()
        job = await self._conversion_requests.begin(wish, runner)
        return await self._changed(lambda _: job)

    @returning_errors
    async def explain_unrunnable(self, model_id: str, problem: ImpetusError) -> None:
        """Raise what a request for a model gets that cannot run here because of `problem`.

        With the setting `auto_convert` the conversion that helps begins.
        """
        raise await self._unrunnable.answer(model_id, problem, await self._loaded())

    async def _sweep(self) -> None:
        async def known() -> list[Job]:
            return (await self._loaded()).jobs()

        await sweep_uploads(self._uploads, known)

    @returning_errors
    async def finish_upload(self, upload_id: str) -> JobDetail:
        """Return the job of a finished upload.  Raises NotFound, UploadConflict."""
        await self._loaded()
        state = await call_in_thread("impetus-upload", lambda: self._uploads.get(upload_id))
        if not state.upload.is_finished:
            raise UploadConflict("The upload is not finished.")
        arrival = arrival_of(state.upload)
        return await self._changed(lambda runner: add_arrival(runner, UPLOAD, arrival))

    @returning_errors
    async def forget_upload(self, upload_id: str) -> None:
        """Cancel the job of an upload, and delete what has arrived.  Raises NotFound."""
        runner = await self._loaded()
        job = active_arrivals(runner.jobs()).get(upload_id)
        if job is not None:
            runner.cancel(job.id)
            await runner.save()
        else:
            await call_in_thread("impetus-upload", lambda: self._uploads.remove(upload_id))

    @returning_errors
    async def browse(self, path: str) -> FolderListing:
        """Return what is in a folder; see `router.upload_service.LocalFiles`."""
        return await self._files.browse(path)

    @returning_errors
    async def import_model(self, path: str, how: ImportHow, name: str) -> JobDetail:
        """Return the job of an import; see `router.upload_service.LocalFiles`."""
        await self._loaded()
        arrival = await self._files.plan(path, how, name)
        return await self._changed(lambda runner: add_arrival(runner, IMPORT, arrival))

    @returning_errors
    async def model_folders(self) -> ModelFolders:
        """Return the folders that are scanned."""
        return await self._files.model_folders()

    @returning_errors
    async def remove_model_folder(self, path: str) -> ModelFolders:
        """Scan an added folder no more.  Raises NotFound."""
        return await self._files.remove_model_folder(path)

    @returning_errors
    async def partials(self) -> list[PartialView]:
        """Return the unfinished downloads that no job goes on with."""
        await self._loaded()
        return await self._partials.listed()

    @returning_errors
    async def remove_partial(self, partial_id: str) -> None:
        """Remove one of them.  Raises NotFound."""
        await self._loaded()
        await self._partials.remove(partial_id)

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

    async def _changed(self, change: Callable[[JobRunner], Job]) -> JobDetail:
        """Change a job and answer once that is stored."""
        runner = await self._loaded()
        job = change(runner)
        await runner.save()
        return await self._detail(runner, job)

    def _view(self, runner: JobRunner, job: Job) -> JobView:
        activity = (
            conversion_activity(self._conversions.progress(job.id), job.total)
            if job.kind == CONVERSION
            else download_activity(self._downloads.progress.get(job.id))
        )
        return view_of(job, activity, runner.held_back(job))

    async def _detail(self, runner: JobRunner, job: Job) -> JobDetail:
        folder = folder_of(job, self._settings.home)
        found = await self._catalog.records_in(folder) if job.state == "done" else []
        return detail_of(job, self._view(runner, job), folder, found)

    def __del__(self) -> None:
        """Cancel all tasks; the children end with this process."""
        if hasattr(self, "_supervisor"):
            self._supervisor.cancel()
        if hasattr(self, "_catalog"):
            self._catalog.close()
