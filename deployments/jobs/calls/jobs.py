"""Calls about all jobs: lists, changes and what a user does with one."""

import asyncio
from collections.abc import Callable, Mapping

from catalog.jobs import Job
from core.errors import Unavailable
from deployments.jobs.catalog import CatalogReader
from deployments.jobs.feed import JobFeed
from deployments.jobs.kind import NO_ACTIVITY, JobKind, view_of
from deployments.jobs.runner import JobRunner
from deployments.serve.handles import returning_errors
from router.job_service import JobChanges, JobDetail, JobView

_LOAD_LIMIT_S = 10.0
# A router waits this long for a change of the jobs.
_CHANGES_LIMIT_S = 10.0


class JobCalls:
    """The part of the deployment that all kinds of jobs share; for one event loop."""

    _catalog: CatalogReader
    _kinds: Mapping[str, JobKind]

    def __init__(self) -> None:
        self._runner: JobRunner | None = None
        self._feed: JobFeed | None = None
        self._problem = "The stored jobs are being read."
        self._has_runner = asyncio.Event()

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

    async def _changed(self, change: Callable[[JobRunner], Job]) -> JobDetail:
        """Change a job and answer once that is stored."""
        runner = await self._loaded()
        job = change(runner)
        await runner.save()
        return await self._detail(runner, job)

    def _view(self, runner: JobRunner, job: Job) -> JobView:
        kind = self._kinds.get(job.kind)
        return view_of(
            job, NO_ACTIVITY if kind is None else kind.activity(job), runner.held_back(job)
        )

    async def _detail(self, runner: JobRunner, job: Job) -> JobDetail:
        view, kind = self._view(runner, job), self._kinds.get(job.kind)
        # A newer version may have stored a kind that this one does not know.
        if kind is None:
            return JobDetail(**view.model_dump())
        is_done = job.state == "done"
        found = await self._catalog.records_in(kind.folder(job)) if is_done else []
        return kind.detail(job, view, found)
