"""Shows jobs as the API does; pure."""

from catalog.hub.download.job import DownloadJob
from catalog.hub.download.record import without_secrets
from catalog.hub.download.run import DownloadProgress
from catalog.jobs import Job
from router.job_service import JobDetail, JobFile, JobView

_LONGEST_REASON = 2000


def view_of(job: Job, progress: DownloadProgress | None, held_back: str) -> JobView:
    """Return a job as the list shows it; `progress` is that of a download which runs.

    `held_back` says why a job of the queue does not start.
    """
    running = progress if job.state == "running" else None
    now = running.reason if running else held_back
    return JobView(
        id=job.id,
        kind=job.kind,
        title=job.title,
        state=job.state,
        reason=(job.reason or now)[:_LONGEST_REASON],
        code=job.code,
        created_at=job.created,
        started_at=job.started,
        ended_at=job.ended,
        retry_at=job.not_before,
        done_bytes=job.done,
        total_bytes=job.total,
        bytes_per_s=running.speed if running else 0.0,
        remaining_s=running.remaining_s if running else None,
        stalled_s=running.stalled_s if running else 0.0,
    )


def detail_of(job: Job, view: JobView, model_ids: tuple[str, ...]) -> JobDetail:
    """Return a download with what it fetches; `model_ids` are what the catalog has of it."""
    wanted = DownloadJob.from_json(job.work)
    files = tuple(
        JobFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
        for file in wanted.files
    )
    return JobDetail(
        **view.model_dump(),
        repository="" if wanted.url else wanted.repository,
        commit=wanted.commit,
        url=without_secrets(wanted.url),
        folder=str(wanted.target),
        files=files,
        model_ids=model_ids,
    )
