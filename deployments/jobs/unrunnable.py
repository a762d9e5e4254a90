"""Answers requests for models that cannot run here: which conversion helps, or is running."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from backends.base import Backend, EngineOptions, ModelInfo
from catalog.convert.choice import least_lossy_conversion, smaller_conversion
from catalog.convert.forecast import ConversionForecast, SpeedFile, forecast
from catalog.convert.work import ConversionWork, planned
from catalog.jobs import Job
from catalog.models import Converted, ModelRecord
from core.errors import (
    BackendUnavailable,
    ConversionNeeded,
    ImpetusError,
    InsufficientMemory,
    RequestError,
    Unavailable,
)
from core.settings import Settings
from core.units import format_bytes
from deployments.jobs.catalog import CatalogReader
from deployments.jobs.conversion_requests import (
    ConversionRequests,
    active_conversions,
    title_of,
)
from deployments.jobs.conversions import KIND, ConversionJobs, remaining_s
from deployments.jobs.runner import JobRunner

# A conversion that failed is not begun again by requests for this long.
_FAILURE_KEPT_S = 600.0
_FIRST_GUESS_S = 30
_LONGEST_RETRY_S = 120
_MINUTE_S = 60


class UnrunnableModels:
    """Tells of conversions, and begins them if the setting `auto_convert` says so."""

    def __init__(
        self,
        settings: Settings,
        backends: Mapping[str, Backend],
        options: EngineOptions,
        catalog: CatalogReader,
        jobs: ConversionJobs,
        requests: ConversionRequests,
        speeds: SpeedFile,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._models = settings.home / "models"
        self._is_automatic = settings.auto_convert
        self._backends = backends
        self._options = options
        self._catalog = catalog
        self._jobs = jobs
        self._requests = requests
        self._speeds = speeds
        self._clock = clock

    async def answer(self, model_id: str, problem: ImpetusError, runner: JobRunner) -> ImpetusError:
        """Return the error for a request for a model that cannot run here, because of `problem`.

        It tells of the conversion that runs or that would help; with the setting `auto_convert`
        that one begins.
        """
        records = await self._catalog.records()
        record = next((one for one in records if one.id == model_id), None)
        if record is None:
            return problem
        results = [
            other.id
            for other in records
            if isinstance(other.source, Converted) and other.source.model_id == model_id
        ]
        if results:
            return _with_note(
                problem, f"Its converted versions cannot run here either: {', '.join(results)}."
            )
        active = [job for job, work in active_conversions(runner) if work.model_id == model_id]
        if active:
            return self._being_converted(problem, active[0])
        work = await asyncio.to_thread(self._choose, record, problem)
        return problem if work is None else await self._offer(problem, record, work, runner)

    async def _offer(
        self, problem: ImpetusError, record: ModelRecord, work: ConversionWork, runner: JobRunner
    ) -> ImpetusError:
        """Begin the conversion that helps, or tell how to."""
        failure = self._last_failure(work, runner)
        if not self._is_automatic:
            speeds = await asyncio.to_thread(self._speeds.read)
            expected = forecast(
                record.info, work.target_format, work.quantization, work.group_size, speeds
            )
            note = f" The last conversion failed: {failure}" if failure else ""
            return ConversionNeeded(
                f"{problem.message} {_how_to(work, expected)}{note}", param="model"
            )
        if failure:
            return _with_note(problem, f"Its conversion failed: {failure}")
        try:
            await asyncio.to_thread(self._requests.check_room, work, record)
        except RequestError as refusal:
            return _with_note(problem, refusal.message)
        job = runner.add(KIND, title_of(work), replace(work, is_awaited=True).to_json())
        await runner.save()
        return self._being_converted(problem, job)

    def _choose(self, record: ModelRecord, problem: ImpetusError) -> ConversionWork | None:
        if isinstance(record.source, Converted) or record.info.format not in self._backends:
            return None
        runnable = {
            name for name, backend in self._backends.items() if backend.availability().is_available
        }
        choice = None
        if isinstance(problem, InsufficientMemory):
            choice = smaller_conversion(record.info, runnable, self._fits)
        elif isinstance(problem, BackendUnavailable):
            choice = least_lossy_conversion(record.info, runnable)
        if choice is None:
            return None
        target_format, quantization = choice
        return planned(
            record.id, record.info, self._models, target_format, quantization=quantization
        )

    def _fits(self, info: ModelInfo) -> bool:
        try:
            self._backends[info.format].estimate(info, self._options)
        except ImpetusError:
            return False
        return True

    def _last_failure(self, work: ConversionWork, runner: JobRunner) -> str:
        """Return why the same conversion failed a short while ago; empty if it did not."""
        failed = [
            (job.ended or 0.0, job.reason)
            for job in runner.jobs()
            if job.kind == KIND
            and job.state == "failed"
            and ConversionWork.from_json(job.work).is_same_result(work)
        ]
        ended, reason = max(failed, default=(0.0, ""))
        return reason if self._clock() - ended < _FAILURE_KEPT_S else ""

    def _being_converted(self, problem: ImpetusError, job: Job) -> Unavailable:
        work = ConversionWork.from_json(job.work)
        found = self._jobs.progress(job.id) if job.state == "running" else None
        fraction, doing, left_s = job.done / max(job.total, 1), job.reason or job.state, None
        if found is not None:
            progress, active_s = found
            fraction, doing = progress.fraction, progress.doing
            left_s = remaining_s(fraction, active_s)
        retry_s = _FIRST_GUESS_S if left_s is None else int(left_s) + 1
        return Unavailable(
            f"{problem.message} It is being converted to {work.target_format} {work.quantization} "
            f"({doing}, {fraction:.0%}); try again later. The job is {job.id}.",
            param="model",
            retry_after_s=max(1, min(retry_s, _LONGEST_RETRY_S)),
        )


def _how_to(work: ConversionWork, expected: ConversionForecast) -> str:
    """Return which conversion helps, what it takes, and how to start it."""
    fields = f'"model": "{work.model_id}", "format": "{work.target_format}"'
    return (
        f"It can be converted to {work.target_format} {work.quantization}, which takes about "
        f"{_duration(expected.seconds)}{'' if expected.is_measured else ' (estimated)'}, "
        f"{format_bytes(expected.result_bytes)} of disk space and "
        f"{format_bytes(expected.memory_bytes)} of memory: POST /api/convert with "
        f'{{{fields}, "quantization": "{work.quantization}"}}, or scripts/models convert '
        f"{work.model_id} --to {work.target_format} --quantization {work.quantization}. "
        "IMPETUS_AUTO_CONVERT=true converts such models when they are requested."
    )


def _duration(seconds: float) -> str:
    if seconds < 2 * _MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE_S:.0f} minutes"


def _with_note(problem: ImpetusError, note: str) -> ImpetusError:
    return type(problem)(
        f"{problem.message} {note}", param=problem.param, retry_after_s=problem.retry_after_s
    )
