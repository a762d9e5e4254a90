"""The Serve deployment of long jobs: one process that owns them, and goes on after its kill."""

import asyncio
import logging
from dataclasses import replace

from backends.registry import backends_for
from catalog.convert.forecast import SpeedFile
from catalog.hub.client import HubClient
from catalog.hub.fit import Room
from catalog.hub.token import TokenFile, current_token
from catalog.job_store import JobStore
from catalog.jobs import Job
from catalog.uploads.store import UploadStore
from core.errors import ImpetusError, Unavailable
from core.settings import Settings
from core.supervision import Supervisor, call_in_thread
from deployments.jobs.arrivals import KINDS as ARRIVALS
from deployments.jobs.arrivals import ArrivalJobs
from deployments.jobs.calls.arrivals import ArrivalCalls
from deployments.jobs.calls.conversions import ConversionCalls
from deployments.jobs.calls.downloads import DownloadCalls
from deployments.jobs.calls.hub import HubCalls
from deployments.jobs.catalog import CatalogReader
from deployments.jobs.conversion_requests import ConversionRequests
from deployments.jobs.conversions import KIND as CONVERSION
from deployments.jobs.conversions import ConversionJobs
from deployments.jobs.downloads import KIND as DOWNLOAD
from deployments.jobs.downloads import DownloadJobs
from deployments.jobs.feed import JobFeed
from deployments.jobs.hub import HubReader
from deployments.jobs.limits import DownloadLimits, LimitsFile
from deployments.jobs.local_files import LocalFiles
from deployments.jobs.memory import MemoryLeases
from deployments.jobs.partials import Partials
from deployments.jobs.quality import QualityMeasurer
from deployments.jobs.runner import JobRunner
from deployments.jobs.strain import StrainWatch
from deployments.jobs.unrunnable import UnrunnableModels
from deployments.messages import SchedulerSnapshot
from deployments.options import budget_bytes, engine_options
from deployments.serve.awake import keep_awake
from deployments.serve.handles import Handle, call, direct
from deployments.serve.worker import prepare_worker

logger = logging.getLogger(__name__)

_SCHEDULER_LIMIT_S = 5.0
_SILENCE_S = 60.0


class JobsReplica(DownloadCalls, ConversionCalls, ArrivalCalls, HubCalls):
    """Runs the jobs of `jobs.sqlite` in the home folder; see `router.job_service.Jobs`.

    All state belongs to one event loop; disks and networks are used on threads and in children.
    """

    def __init__(self, settings: Settings, scheduler: Handle) -> None:
        super().__init__()
        prepare_worker()
        self._settings = settings
        self._scheduler = direct(scheduler)
        self._token_file = TokenFile(settings.home)
        backends = backends_for(settings.formats)
        budget = budget_bytes(settings)
        options = engine_options(settings, budget)
        self._catalog = CatalogReader(settings.catalog_file, scheduler)
        self._downloads = DownloadJobs(self._token, self._catalog.register, settings.download_hosts)
        arrivals = ArrivalJobs(settings, self._catalog.register)
        self._uploads = UploadStore(settings.home)
        self._files = LocalFiles(settings)
        speeds = SpeedFile(settings.home / "conversion_speeds.json")
        memory = MemoryLeases(scheduler)
        self._conversions = ConversionJobs(
            settings, self._catalog, memory, speeds, QualityMeasurer(memory, budget)
        )
        self._kinds = {
            DOWNLOAD: self._downloads,
            CONVERSION: self._conversions,
            **dict.fromkeys(ARRIVALS, arrivals),
        }
        requests = ConversionRequests(settings, backends, self._catalog, speeds)
        self._conversion_requests = requests
        self._unrunnable = UnrunnableModels(
            settings, backends, options, self._catalog, self._conversions, requests, speeds
        )
        self._limits_file = LimitsFile(settings.home / "download_limits.json")
        self._limits = DownloadLimits()
        self._strain = StrainWatch(scheduler, {DOWNLOAD, *ARRIVALS})
        self._hub = HubReader(
            backends,
            options,
            settings.home / "models" / "hub",
            self._room,
            lambda: HubClient(token=self._token()),
            settings.download_hosts,
        )
        self._partials = Partials(settings.home / "models" / "hub", self._download_jobs)
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
            await call_in_thread("impetus-sweep", self._conversions.sweep)
            self._use(await call_in_thread("impetus-limits", self._limits_file.read))
            feed = self._feed = JobFeed(
                lambda: [job.id for job in runner.jobs()],
                lambda job_id: self._view(runner, runner.job(job_id)),
            )
            runner = JobRunner(
                store,
                self._kinds,
                lambda: self._limits.applied_to(self._strain.limits(self._kinds), DOWNLOAD),
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

    def __del__(self) -> None:
        """Cancel all tasks; the children end with this process."""
        if hasattr(self, "_supervisor"):
            self._supervisor.cancel()
        if hasattr(self, "_catalog"):
            self._catalog.close()
