"""The jobs that convert models; one that is held back is stopped where it is, for some minutes."""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backends.small_json import read_object
from catalog.convert.disk import require_share, result_bytes
from catalog.convert.forecast import Measured, SpeedFile, measured_kind
from catalog.convert.memory import needed_bytes
from catalog.convert.output import sweep
from catalog.convert.pause import PauseSwitch
from catalog.convert.quality.figure import QualityFigure
from catalog.convert.run import ConversionProgress, ConversionRequest, convert, plan
from catalog.convert.work import ConversionWork
from catalog.jobs import Job
from catalog.models import PROVENANCE, Converted, ModelRecord
from core.awake_time import AwakeTimer
from core.errors import BrokenModel, ImpetusError
from core.settings import Settings
from deployments.jobs.catalog import CatalogReader
from deployments.jobs.kind import NO_ACTIVITY, Activity, ids_of
from deployments.jobs.memory import MemoryLeases
from deployments.jobs.quality import Comparison, QualityMeasurer
from deployments.jobs.runner import Report
from deployments.messages import MemoryLease
from router.job_service import ConversionView, JobDetail, JobView

logger = logging.getLogger(__name__)

KIND = "conversion"
# A conversion that is held back for longer gives its memory back, and begins anew.
HELD_LIMIT_S = 600.0
_WAITING = ConversionProgress(0.0, 0, 0, "waiting for memory")


@dataclass(slots=True)
class _Running:
    """A conversion that runs, or is stopped where it is; times are monotonic, in seconds."""

    report: Callable[[ConversionProgress], None]
    pause: PauseSwitch = field(default_factory=PauseSwitch)
    progress: ConversionProgress = _WAITING
    task: "asyncio.Task[None] | None" = None
    ending: AwakeTimer | None = None
    started_at: float | None = None
    held_at: float | None = None
    held_s: float = 0.0

    def active_s(self, now: float) -> float:
        """Return for how long it has run, without the time in which it was held back."""
        if self.started_at is None:
            return 0.0
        held_s = self.held_s + (now - self.held_at if self.held_at is not None else 0.0)
        return now - self.started_at - held_s


class ConversionJobs:
    """Converts what the work of a job tells, each in child processes with leased memory.

    The result is in the catalog before its job is done.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: CatalogReader,
        memory: MemoryLeases,
        speeds: SpeedFile,
        quality: QualityMeasurer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = settings.home / "models"
        self._limit_bytes = settings.conversion_disk
        self._threads = settings.threads or 1
        self._catalog = catalog
        self._memory = memory
        self._speeds = speeds
        self._quality = quality
        self._clock = clock
        self._running: dict[str, _Running] = {}

    def sweep(self) -> None:
        """Remove leftovers of conversions whose process died; blocks while folders are listed."""
        if self._models.is_dir():
            inside = (path for path in self._models.iterdir() if not path.is_symlink())
            for folder in [self._models, *(path for path in inside if path.is_dir())]:
                sweep(folder)

    def progress(self, job_id: str) -> tuple[ConversionProgress, float] | None:
        """Return how far a job is, and for how many seconds it has run; None without any."""
        running = self._running.get(job_id)
        return None if running is None else (running.progress, running.active_s(self._clock()))

    async def run(self, job: Job, report: Report) -> None:
        """Convert the model; see `JobHandler`.

        Cancelling stops the processes where they are; the next run lets them go on.
        """
        work = ConversionWork.from_json(job.work)
        if not await asyncio.to_thread(is_made, work):
            await self._converted(job, work, report)
        try:
            await self._catalog.register(work.target)
        except BrokenModel:
            await asyncio.to_thread(shutil.rmtree, work.target, ignore_errors=True)
            raise

    async def _converted(self, job: Job, work: ConversionWork, report: Report) -> None:
        def tell(progress: ConversionProgress) -> None:
            # A run that begins anew is no progress before it is further than the last one.
            done = int(progress.fraction * work.source_bytes)
            report(max(job.done, done), work.source_bytes)

        running = self._running.get(job.id)
        if running is None or running.task is None or running.task.done():
            running = self._running[job.id] = _Running(tell)
            running.task = asyncio.create_task(
                self._convert(job.id, work, running), name=f"conversion {job.id}"
            )
            # One that fails while it is held back begins anew.
            running.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        running.report = tell
        self._go_on(running)
        try:
            await asyncio.shield(running.task)
        except asyncio.CancelledError:
            await self._hold(running)
            raise
        finally:
            if running.task.done():
                self._running.pop(job.id, None)

    async def _convert(self, job_id: str, work: ConversionWork, running: _Running) -> None:
        record = await self._catalog.source(work.model_id)
        request = ConversionRequest(
            record.info,
            work.target_format,
            work.target,
            quantization=work.quantization,
            group_size=work.group_size,
            threads=self._threads,
            model_id=record.id,
        )
        await asyncio.to_thread(self._prepare, work, record)
        name = f"conversion of {record.id} to {work.kind}"
        needed = _memory(request)
        lease = MemoryLease(job_id, name, record.id, needed)
        async with self._memory.held(lease) as measured:
            running.started_at = self._clock()

            def note(progress: ConversionProgress) -> None:
                running.progress = progress
                running.report(progress)

            async def measure(result: Path, folder: Path) -> QualityFigure:
                if work.is_awaited:
                    return QualityFigure(reason="not measured: a request waited for the model")
                both = Comparison(job_id, record, work, needed, request.threads)
                return await self._quality.measure(both, result, folder, running.pause)

            await convert(request, note, running.pause, measured, measure)
        kind = measured_kind(record.info.format, work.target_format)
        took = Measured(record.info.size_bytes, running.active_s(self._clock()))
        await asyncio.to_thread(self._speeds.add, kind, took)
        logger.info("converted %s to %s in %.0f s", record.id, work.kind, took.seconds)

    def _prepare(self, work: ConversionWork, record: ModelRecord) -> None:
        """Make room for the result; blocks.  Raises InsufficientDisk with the numbers."""
        parent = work.target.parent
        sweep(parent)
        expected = result_bytes(record.info, work.quantization, work.group_size)
        require_share(self._models, expected, self._limit_bytes)
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ImpetusError(
                f"{parent} cannot be created ({problem.strerror}); make the folder writable."
            ) from problem

    def _go_on(self, running: _Running) -> None:
        if running.ending is not None:
            running.ending.cancel()
            running.ending = None
        if running.held_at is not None:
            running.held_s += self._clock() - running.held_at
            running.held_at = None
        running.pause.switch(is_on=False)

    async def _hold(self, running: _Running) -> None:
        """Stop a conversion where it is; one that waits for memory gives up its place."""
        assert running.task is not None
        if running.task.done():
            return
        if running.started_at is None:
            await _end(running.task)
            return
        running.pause.switch(is_on=True)
        running.held_at = self._clock()
        running.ending = AwakeTimer(HELD_LIMIT_S, running.task.cancel)

    async def discard(self, job: Job) -> None:
        """End the processes of a job that is cancelled, and remove what they made."""
        running = self._running.pop(job.id, None)
        if running is not None and running.task is not None:
            if running.ending is not None:
                running.ending.cancel()
            await _end(running.task)
        await asyncio.to_thread(sweep, ConversionWork.from_json(job.work).target.parent)

    def activity(self, job: Job) -> Activity:
        """Return what a conversion does; see `JobKind`."""
        found = self.progress(job.id)
        if found is None:
            return NO_ACTIVITY
        progress, active_s = found
        done = int(progress.fraction * job.total)
        speed = done / active_s if active_s > 0 else 0.0
        return Activity(progress.doing, done, speed, remaining_s(progress.fraction, active_s))

    def folder(self, job: Job) -> Path:
        """Return the folder of the converted model."""
        return ConversionWork.from_json(job.work).target

    def detail(self, job: Job, view: JobView, found: Sequence[ModelRecord]) -> JobDetail:
        """Return a conversion with its choices and, once it is done, its measured quality."""
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
            model_ids=ids_of(found),
            conversion=made,
        )

    async def close(self) -> None:
        """End everything that runs or is held back."""
        several, self._running = self._running, {}
        tasks = [one.task for one in several.values() if one.task is not None]
        for running in several.values():
            if running.ending is not None:
                running.ending.cancel()
        await asyncio.gather(*(_end(task) for task in tasks))


def remaining_s(fraction: float, active_s: float) -> float | None:
    """Return the seconds that a conversion has left; None before there is any progress."""
    return active_s * (1 - fraction) / fraction if fraction > 0 else None


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _memory(request: ConversionRequest) -> int:
    route = plan(request.source.format, request.target_format, request.quantization)
    return needed_bytes(request.source, route)


def is_made(work: ConversionWork) -> bool:
    """Whether the result is complete: its process may have ended before that was stored."""
    try:
        stored = read_object(work.target / PROVENANCE).get("parameters")
    except BrokenModel:
        return False
    if not isinstance(stored, dict):
        return False
    made = ConversionWork(
        str(stored.get("model_id")),
        str(stored.get("target_format")),
        str(stored.get("quantization")),
        stored.get("group_size") or work.group_size,
        work.target,
    )
    return made == work
