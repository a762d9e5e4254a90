"""Shows jobs as the API does; pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from catalog.convert.run import ConversionProgress
from catalog.convert.work import ConversionWork
from catalog.hub.download.job import DownloadJob
from catalog.hub.download.record import without_secrets
from catalog.hub.download.run import DownloadProgress
from catalog.jobs import Job
from catalog.models import Converted, ModelRecord
from catalog.uploads.arrival import Arrival
from deployments.jobs.arrivals import KINDS as ARRIVALS
from deployments.jobs.conversions import KIND as CONVERSION
from deployments.jobs.conversions import remaining_s
from router.job_service import ConversionView, JobDetail, JobFile, JobView

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


_NOTHING = Activity()


def download_activity(progress: DownloadProgress | None) -> Activity:
    """Return what a download does; `progress` is None while it does not run."""
    if progress is None:
        return _NOTHING
    return Activity(
        progress.reason,
        bytes_per_s=progress.speed,
        remaining_s=progress.remaining_s,
        stalled_s=progress.stalled_s,
    )


def conversion_activity(found: tuple[ConversionProgress, float] | None, total: int) -> Activity:
    """Return what a conversion of `total` bytes does, after the seconds that it has run."""
    if found is None:
        return _NOTHING
    progress, active_s = found
    done = int(progress.fraction * total)
    speed = done / active_s if active_s > 0 else 0.0
    return Activity(progress.doing, done, speed, remaining_s(progress.fraction, active_s))


def view_of(job: Job, activity: Activity, held_back: str) -> JobView:
    """Return a job as the list shows it; `held_back` says why one of the queue does not start."""
    is_running = job.state == "running"
    now = activity if is_running else _NOTHING
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


def folder_of(job: Job, home: Path) -> Path:
    """Return the folder that a job's model has in the end."""
    if job.kind in ARRIVALS:
        return Arrival.from_json(job.work).folder(home)
    work = ConversionWork if job.kind == CONVERSION else DownloadJob
    return work.from_json(job.work).target


def detail_of(job: Job, view: JobView, folder: Path, found: Sequence[ModelRecord]) -> JobDetail:
    """Return a job with what it does; `found` are what the catalog has in its folder."""
    if job.kind in ARRIVALS:
        arrival = Arrival.from_json(job.work)
        files = tuple(
            JobFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in arrival.files
        )
        return JobDetail(
            **view.model_dump(), folder=str(folder), files=files, model_ids=_ids(found)
        )
    detail = _conversion_detail if job.kind == CONVERSION else _download_detail
    return detail(job, view, found)


def _download_detail(job: Job, view: JobView, found: Sequence[ModelRecord]) -> JobDetail:
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
        model_ids=_ids(found),
    )


def _conversion_detail(job: Job, view: JobView, found: Sequence[ModelRecord]) -> JobDetail:
    work = ConversionWork.from_json(job.work)
    made = ConversionView(
        source=work.model_id,
        format=work.target_format,
        quantization=work.quantization,
        group_size=work.group_size if work.target_format == "mlx" else None,
    )
    for record in found:
        if isinstance(record.source, Converted):
            source = record.source
            made = ConversionView.of(source.model_id, source.choices, source.quality) or made
    return JobDetail(
        **view.model_dump(),
        folder=str(work.target),
        model_ids=_ids(found),
        conversion=made,
    )


def _ids(found: Sequence[ModelRecord]) -> tuple[str, ...]:
    return tuple(record.id for record in found)
