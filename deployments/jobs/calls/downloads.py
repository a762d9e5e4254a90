"""Calls about downloads: begin one, limits, and what is left of unfinished ones."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from core.supervision import call_in_thread
from deployments.jobs.calls.jobs import JobCalls
from deployments.jobs.downloads import DownloadJobs, add_download, prepare
from deployments.jobs.hub import HubReader
from deployments.jobs.limits import DownloadLimits, LimitsFile
from deployments.jobs.partials import Partials
from deployments.serve.handles import returning_errors
from router.job_service import DownloadLimitsView, JobDetail, PartialView


class DownloadCalls(JobCalls):
    """The part of the deployment that downloads."""

    _downloads: DownloadJobs
    _hub: HubReader
    _limits: DownloadLimits
    _limits_file: LimitsFile
    _partials: Partials

    @returning_errors
    async def download(self, model: str, revision: str, entry: str) -> JobDetail:
        """Return the job of a download; see `router.job_service.Jobs`."""
        await self._loaded()
        wanted = await self._hub.plan(model, revision, entry)
        await call_in_thread("impetus-target", lambda: prepare(wanted))
        return await self._changed(lambda runner: add_download(runner, wanted))

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
        self._use(limits)
        runner.look_again()
        return DownloadLimitsView(**asdict(limits))

    def _use(self, limits: DownloadLimits) -> None:
        self._limits = limits
        self._downloads.limit_bytes_per_s = limits.bytes_per_s

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
