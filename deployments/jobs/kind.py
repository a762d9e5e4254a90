"""What a kind of job is to the process of jobs, and how a job is shown by the API."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from catalog.jobs import Job
from catalog.models import ModelRecord
from deployments.jobs.runner import JobHandler
from router.job_service import JobDetail, JobView

_LONGEST_REASON = 2000


@dataclass(frozen=True, slots=True)
class Activity:
    """What a job that runs does now; a speed of 0 and None for times mean unknown.

    `done_bytes` None means what the job itself says.
    """

    text: str = ""
    done_bytes: int | None = None
    bytes_per_s: float = 0.0
    remaining_s: float | None = None
    stalled_s: float = 0.0


NO_ACTIVITY = Activity()


class JobKind(JobHandler, Protocol):
    """Does the work of one kind of job, and tells about it; the methods here do not block."""

    def activity(self, job: Job) -> Activity:
        """Return what a job does now; `NO_ACTIVITY` if it does not run."""
        ...

    def folder(self, job: Job) -> Path:
        """Return the folder that the job's model has in the end."""
        ...

    def detail(self, job: Job, view: JobView, found: Sequence[ModelRecord]) -> JobDetail:
        """Return a job with its work; `found` are what the catalog has in its folder."""
        ...


def view_of(job: Job, activity: Activity, held_back: str) -> JobView:
    """Return a job as the list shows it; `held_back` says why one of the queue does not start."""
    is_running = job.state == "running"
    now = activity if is_running else NO_ACTIVITY
    return JobView(
        id=job.id,
        kind=job.kind,
        title=job.title,
        state=job.state,
        reason=(job.reason or (now.text if is_running else held_back))[:_LONGEST_REASON],
        code=job.code,
        created_at=job.created,
        started_at=job.started,
        ended_at=job.ended,
        retry_at=job.not_before,
        done_bytes=job.done if now.done_bytes is None else now.done_bytes,
        total_bytes=job.total,
        bytes_per_s=now.bytes_per_s,
        remaining_s=now.remaining_s,
        stalled_s=now.stalled_s,
    )


def ids_of(found: Sequence[ModelRecord]) -> tuple[str, ...]:
    """Return the ids of models in the catalog."""
    return tuple(record.id for record in found)
