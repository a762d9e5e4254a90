"""Runs long jobs: starts what may run, stops what is held back, stores every change.

One event loop; the work itself is done by handlers, in child processes.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Protocol

from catalog import jobs
from catalog.job_store import MAX_ENDED, JobStore
from catalog.jobs import ENDED, Job, JobInterrupted, JobLimits
from core.errors import (
    ImpetusError,
    InsufficientDisk,
    InsufficientMemory,
    NotFound,
    RequestError,
    Unavailable,
)

logger = logging.getLogger(__name__)

MAX_JOBS = 1000
# Between looks at limits that change by themselves: hours, heat, pressure.
_LOOK_S = 5.0
_RETRY_S = 60
# For a full disk, whose room is looked at before anything else.
_DISK_RETRY_S = 300
Report = Callable[[int, int], None]


class JobHandler(Protocol):
    """Does the work of one kind of job."""

    async def run(self, job: Job, report: Report) -> None:
        """Do the work, telling how much of all is done; what an earlier run did is used.

        Cancelling stops it and keeps what is done.  Raises Unavailable for what may pass by
        itself, JobInterrupted if its process ended, other ImpetusErrors for good; so does
        InsufficientMemory.
        """
        ...

    async def discard(self, job: Job) -> None:
        """Remove what was done of a job that is cancelled."""
        ...


class JobRunner:
    """Runs the jobs of a store by kind; for one event loop.

    `limits` is asked at every look; `on_change` is told every new state of a job, and all that is
    reported of its progress.  `on_look` is called at every look.
    """

    def __init__(
        self,
        store: JobStore,
        handlers: Mapping[str, JobHandler],
        limits: Callable[[], JobLimits],
        *,
        on_change: Callable[[Job], None] = lambda _: None,
        on_look: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._handlers = handlers
        self._limits = limits
        self._on_change = on_change
        self._on_look = on_look
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unsaved: set[str] = set()
        self._changed = asyncio.Event()
        self._saving = asyncio.Lock()
        self._loaded = asyncio.Event()

    @property
    def is_working(self) -> bool:
        """Whether a job runs now."""
        return bool(self._tasks)

    @property
    def is_loaded(self) -> bool:
        """Whether the stored jobs are known."""
        return self._loaded.is_set()

    async def wait_until_loaded(self) -> None:
        """Wait until the stored jobs are known."""
        await self._loaded.wait()

    async def run(self) -> None:
        """Run jobs until cancelled; then those that run are stopped, and go on at the next start.

        Raises CatalogNotWritten if the store cannot be read.
        """
        stored = await asyncio.to_thread(self._store.jobs)
        for job in jobs.after_restart(stored):
            self._jobs.setdefault(job.id, job)
        self._loaded.set()
        try:
            while True:
                self._changed.clear()
                self._look()
                await self.save()
                self._on_look()
                wait_s = jobs.next_change(self._jobs.values(), self._clock())
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(_LOOK_S, wait_s or _LOOK_S)):
                        await self._changed.wait()
        finally:
            await self._end()

    def jobs(self) -> list[Job]:
        """Return all jobs, in the order of the queue."""
        return sorted(self._jobs.values(), key=lambda job: (job.rank, job.created, job.id))

    def job(self, job_id: str) -> Job:
        """Return a job.  Raises NotFound."""
        if job_id not in self._jobs:
            raise NotFound(f"There is no job {job_id[:80]!r}.", param="id")
        return self._jobs[job_id]

    def held_back(self, job: Job) -> str:
        """Return why a job of the queue does not start although it could; else nothing."""
        now = self._clock()
        if job.state != "queued":
            return ""
        return jobs.why_not(job, self._limits(), now, datetime.fromtimestamp(now))

    def add(self, kind: str, title: str, work: str) -> Job:
        """Return a new job at the end of the queue, or the one that does the same work already.

        Raises RequestError for an unknown kind, and for too many jobs.
        """
        if kind not in self._handlers:
            raise RequestError(f"{kind!r} is not a kind of job.", param="kind")
        active = [job for job in self._jobs.values() if job.state not in ENDED]
        for job in active:
            if (job.kind, job.work) == (kind, work):
                return job
        if len(active) >= MAX_JOBS:
            raise RequestError(f"There are {MAX_JOBS} jobs already; cancel some first.")
        rank = max((job.rank for job in active), default=0.0) + 1.0
        job = Job(secrets.token_hex(8), kind, title, work, self._clock(), rank)
        self._set(job)
        return job

    def pause(self, job_id: str) -> Job:
        """Stop a job and keep what is done.  Raises NotFound, RequestError."""
        return self._stop(jobs.pause(self.job(job_id)))

    def cancel(self, job_id: str) -> Job:
        """Stop a job and remove what is done.  Raises NotFound, RequestError."""
        job = self._stop(jobs.cancel(self.job(job_id), self._clock()))
        if job_id not in self._tasks:
            self._begin(job, self._discard(job))
        return job

    def resume(self, job_id: str) -> Job:
        """Put a paused or failed job back into the queue.  Raises NotFound, RequestError."""
        return self._set(jobs.resume(self.job(job_id)))

    def look_again(self) -> None:
        """Look at the limits now."""
        self._changed.set()

    def move(self, job_id: str, before: str) -> Job:
        """Put a job before another one, or at the end.  Raises NotFound, RequestError."""
        self.job(job_id)
        return self._set(jobs.move(list(self._jobs.values()), job_id, before))

    def _look(self) -> None:
        """Stop what is held back now, and start what may run."""
        limits, now = self._limits(), self._clock()
        local = datetime.fromtimestamp(now)
        everything = list(self._jobs.values())
        for job in jobs.to_stop(everything, limits, local):
            reason = limits.held.get(job.kind, "it is outside of the hours that are set")
            self._stop(jobs.wait(job, reason, "held", None))
        # One that is still being stopped takes the place of a running one.
        seen = [replace(job, state="running") if job.id in self._tasks else job
                for job in self._jobs.values()]  # fmt: skip
        for job in jobs.next_jobs(seen, limits, now, local):
            started = self._set(jobs.start(job, now))
            self._begin(started, self._work(started))

    def _begin(self, job: Job, work: Coroutine[None, None, None]) -> None:
        self._tasks[job.id] = asyncio.create_task(work, name=f"job {job.id}")

    async def _work(self, job: Job) -> None:
        """Do a job's work, and note how it ended; a state that was set meanwhile stays."""
        try:
            await self._handlers[job.kind].run(job, partial(self._report, job.id))
        except asyncio.CancelledError:
            if self._jobs[job.id].state == "running":
                self._set(jobs.after_restart([self._jobs[job.id]])[0])
        except ImpetusError as problem:
            self._end_with(job.id, problem)
        except Exception as problem:
            logger.exception("the job %s (%s) failed", job.id, job.kind)
            text = f"An unexpected error ({type(problem).__name__}); the server's log has it."
            self._end_with(job.id, ImpetusError(text))
        else:
            if self._jobs[job.id].state == "running":
                self._set(jobs.finish(self._jobs[job.id], self._clock()))
        finally:
            del self._tasks[job.id]
            self._changed.set()
        if self._jobs[job.id].state == "cancelled":
            self._begin(job, self._discard(job))

    def _end_with(self, job_id: str, problem: ImpetusError) -> None:
        """Note an error: the job waits, goes on, or has failed for good."""
        job, now = self._jobs[job_id], self._clock()
        if job.state != "running":
            return
        if isinstance(problem, JobInterrupted):
            self._set(jobs.interrupt(job, problem.message, now))
        elif isinstance(problem, Unavailable) and not isinstance(problem, InsufficientMemory):
            usual = _DISK_RETRY_S if isinstance(problem, InsufficientDisk) else _RETRY_S
            again = now + (problem.retry_after_s or usual)
            self._set(jobs.wait(job, problem.message, problem.code, again))
        else:
            self._set(jobs.fail(job, problem.message, problem.code, now))

    async def _discard(self, job: Job) -> None:
        try:
            await self._handlers[job.kind].discard(job)
        except Exception:
            logger.exception("what is left of the job %s could not be removed", job.id)
        finally:
            del self._tasks[job.id]
            self._changed.set()

    def _report(self, job_id: str, done: int, total: int) -> None:
        job = self._jobs[job_id]
        if done > job.done:
            job = jobs.advance(job)
        job = self._set(jobs.progress(job, done, total), is_urgent=False)
        # Also where nothing arrived: how long it has stalled is shown as well.
        self._on_change(job)

    def _stop(self, job: Job) -> Job:
        """Set a state in which the job does not run, and stop its work."""
        if (task := self._tasks.get(job.id)) is not None:
            task.cancel()
        return self._set(job)

    def _set(self, job: Job, *, is_urgent: bool = True) -> Job:
        """Note a new state of a job; progress is stored at the next look."""
        if self._jobs.get(job.id) != job:
            self._jobs[job.id] = job
            self._unsaved.add(job.id)
            self._on_change(job)
        if is_urgent:
            self._changed.set()
        return job

    async def save(self) -> None:
        """Store what changed; a store that cannot be written is tried again at the next look."""
        async with self._saving:
            await self._save()

    async def _save(self) -> None:
        names, self._unsaved = self._unsaved, set()
        try:
            if names:
                await asyncio.to_thread(self._store.save, [self._jobs[name] for name in names])
        except ImpetusError as problem:
            logger.error("the jobs are not stored for now: %s", problem.message)
            self._unsaved |= names
            return
        over = sorted(
            (job for job in self._jobs.values() if job.state in ENDED),
            key=lambda job: -(job.ended or 0.0),
        )
        for job in over[MAX_ENDED:]:
            del self._jobs[job.id]

    async def _end(self) -> None:
        """Stop everything that runs, and store the jobs as they are."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.save()
