"""Long jobs as a pure state machine: what may happen to each, and which begins next.

Downloads, conversions and scans are jobs.  No clock and no I/O: times are given, in Unix seconds.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, TypeAlias

from core.errors import ImpetusError, RequestError

JobState: TypeAlias = Literal[
    "queued", "running", "paused", "waiting", "interrupted", "done", "failed", "cancelled"
]

# What is over, and what goes on by itself when there is room for it.
ENDED: frozenset[JobState] = frozenset({"done", "failed", "cancelled"})
STARTABLE: frozenset[JobState] = frozenset({"queued", "waiting", "interrupted"})
_MINUTES_OF_A_DAY = 24 * 60
# Nothing is waited for longer at once; what seems to be was noted before the clock was set back.
_LONGEST_WAIT_S = 2 * 3600.0
# A process that dies this often with the same job is not started for it again.
MAX_INTERRUPTIONS = 5


class JobInterrupted(ImpetusError):
    """The process that did a job's work ended before it was done; what it did is kept."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job.  `rank` orders the queue, lowest first; `work` tells what is to be done, as JSON.

    `reason` says why the job waits, failed or was interrupted; `not_before` is when one that waits
    is tried again, None: when what it waits for is over.  `done` and `total` are of its own unit.
    """

    id: str
    kind: str
    title: str
    work: str
    created: float
    rank: float
    state: JobState = "queued"
    reason: str = ""
    code: str = ""
    not_before: float | None = None
    interruptions: int = 0
    started: float | None = None
    ended: float | None = None
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Hours:
    """A part of each day, in minutes since midnight; `end` before `start` passes midnight."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not all(0 <= minute < _MINUTES_OF_A_DAY for minute in (self.start, self.end)):
            raise RequestError(
                "Hours are given from 00:00 to 23:59, such as 22:30-06:00.", param="hours"
            )

    def has(self, when: datetime) -> bool:
        """Whether a local time is within the hours; equal ends mean the whole day."""
        minute = when.hour * 60 + when.minute
        if self.start <= self.end:
            return self.start == self.end or self.start <= minute < self.end
        return minute >= self.start or minute < self.end


def parse_hours(text: str) -> Hours:
    """Return the hours of `22:30-06:00`.  Raises RequestError."""
    try:
        start, end = (_minute(part) for part in text.split("-"))
    except ValueError:
        raise RequestError(
            f"{text[:40]!r} are not hours; write them as 22:30-06:00.", param="hours"
        ) from None
    return Hours(start, end)


def _minute(text: str) -> int:
    hour, minute = text.strip().split(":")
    if not (hour.isdecimal() and minute.isdecimal() and int(hour) < 24 and int(minute) < 60):
        raise ValueError(text)
    return int(hour) * 60 + int(minute)


@dataclass(frozen=True, slots=True)
class JobLimits:
    """How many jobs of each kind run at once (default: one), and within which hours they begin.

    `held` are the kinds that heat, pressure or power hold back now, each with the reason.
    """

    parallel: Mapping[str, int] = field(default_factory=dict)
    hours: Mapping[str, Hours] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)


def start(job: Job, now: float) -> Job:
    """Return the job as it begins, or goes on.  Raises RequestError if it may not."""
    _require(job, STARTABLE, "started")
    first = now if job.started is None else job.started
    return replace(job, state="running", reason="", code="", not_before=None, started=first)


def progress(job: Job, done: int, total: int) -> Job:
    """Return the job with its progress; that of a job which does not run is left as it is."""
    return replace(job, done=done, total=total) if job.state == "running" else job


def finish(job: Job, now: float) -> Job:
    """Return the job as it is done.  Raises RequestError if it does not run."""
    _require(job, {"running"}, "finished")
    return replace(job, state="done", ended=now, done=job.total, reason="", interruptions=0)


def fail(job: Job, reason: str, code: str, now: float) -> Job:
    """Return the job as it failed.  Raises RequestError if it is over."""
    _require(job, {"running", "waiting", "interrupted"}, "failed")
    return replace(job, state="failed", reason=reason, code=code, ended=now)


def wait(job: Job, reason: str, code: str, not_before: float | None) -> Job:
    """Return a running job that waits, for a time or for what `reason` says.

    Raises RequestError if it does not run.
    """
    _require(job, {"running"}, "made to wait")
    return replace(job, state="waiting", reason=reason, code=code, not_before=not_before)


def interrupt(job: Job, reason: str, now: float) -> Job:
    """Return a running job whose process ended; it goes on by itself, but not for ever.

    Other states stay as they are.
    """
    if job.state != "running":
        return job
    count = job.interruptions + 1
    if count >= MAX_INTERRUPTIONS:
        text = f"Its process ended {count} times in a row; the last time: {reason}"
        return replace(job, state="failed", reason=text, interruptions=count, ended=now)
    return replace(job, state="interrupted", reason=reason, interruptions=count)


def after_restart(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs as they are after the server ended, however it did.

    What ran goes on by itself; the end of the server does not count against a job.
    """
    return [
        replace(job, state="interrupted", reason="the server was ended")
        if job.state == "running"
        else job
        for job in jobs
    ]


def advance(job: Job) -> Job:
    """Return a job that got on since its process last ended: those ends are forgotten."""
    return replace(job, interruptions=0) if job.interruptions else job


def pause(job: Job) -> Job:
    """Return the job paused, until it is resumed.  Raises RequestError if it is over."""
    _require(job, {"queued", "running", "waiting", "interrupted", "paused"}, "paused")
    return replace(job, state="paused", reason="", code="", not_before=None)


def resume(job: Job) -> Job:
    """Return a paused or failed job back in the queue.  Raises RequestError for others."""
    _require(job, {"paused", "failed", "waiting", "interrupted"}, "resumed")
    return replace(
        job, state="queued", reason="", code="", not_before=None, ended=None, interruptions=0
    )


def cancel(job: Job, now: float) -> Job:
    """Return the job cancelled.  Raises RequestError if it is over, except if it failed."""
    allowed = {"queued", "running", "paused", "waiting", "interrupted", "failed"}
    _require(job, allowed, "cancelled")
    return replace(job, state="cancelled", reason="", code="", not_before=None, ended=now)


def move(jobs: Sequence[Job], job_id: str, before: str) -> Job:
    """Return the job with a rank before that of another one, or after all with empty `before`.

    Raises RequestError for unknown jobs and those that are over.
    """
    queue = sorted((job for job in jobs if job.state not in ENDED), key=lambda job: job.rank)
    moved = next((job for job in queue if job.id == job_id), None)
    others = [job for job in queue if job.id != job_id]
    place = next((n for n, job in enumerate(others) if job.id == before), None)
    if moved is None or (before and place is None):
        raise RequestError("Only jobs that are not over can be ordered.", param="before")
    place = len(others) if place is None else place
    low = others[place - 1].rank if place else None
    high = others[place].rank if place < len(others) else None
    return replace(moved, rank=_between(low, high))


def _between(low: float | None, high: float | None) -> float:
    if low is None:
        return 0.0 if high is None else high - 1.0
    return low + 1.0 if high is None else (low + high) / 2


def next_jobs(
    jobs: Sequence[Job], limits: JobLimits, now: float, local: datetime
) -> tuple[Job, ...]:
    """Return the jobs to start now, in order; `local` is the local time of `now`."""
    room = {job.kind: limits.parallel.get(job.kind, 1) for job in jobs}
    for job in jobs:
        room[job.kind] -= job.state == "running"
    chosen = []
    for job in sorted(jobs, key=lambda job: (job.rank, job.created, job.id)):
        if room[job.kind] > 0 and not why_not(job, limits, now, local):
            room[job.kind] -= 1
            chosen.append(job)
    return tuple(chosen)


def why_not(job: Job, limits: JobLimits, now: float, local: datetime) -> str:
    """Return why a job does not start now, whatever runs beside it; empty if it may."""
    if job.state not in STARTABLE:
        return f"it is {job.state}"
    if reason := limits.held.get(job.kind):
        return reason
    if not limits.hours.get(job.kind, Hours(0, 0)).has(local):
        return "it is outside of the hours that are set"
    if job.not_before is not None and now < job.not_before <= now + _LONGEST_WAIT_S:
        return f"it is tried again in {job.not_before - now:.0f} s"
    return ""


def to_stop(jobs: Sequence[Job], limits: JobLimits, local: datetime) -> tuple[Job, ...]:
    """Return the running jobs that heat, pressure or the hours hold back now."""
    return tuple(
        job
        for job in jobs
        if job.state == "running"
        and (job.kind in limits.held or not limits.hours.get(job.kind, Hours(0, 0)).has(local))
    )


def next_change(jobs: Iterable[Job], now: float) -> float | None:
    """Return the seconds until a job that waits for a time is tried again, None without any."""
    times = [job.not_before - now for job in jobs if job.not_before is not None]
    return max(min(times), 0.0) if times else None


def _require(job: Job, states: Collection[str], what: str) -> None:
    if job.state not in states:
        raise RequestError(f"The job {job.id} is {job.state} and cannot be {what}.", param="id")
