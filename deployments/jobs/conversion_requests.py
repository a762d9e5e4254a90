"""Answers what a model can be converted to, and begins conversions."""

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from backends.base import Backend, ModelInfo
from catalog.convert.disk import converted_bytes, require_share, result_bytes
from catalog.convert.forecast import Measured, SpeedFile, forecast
from catalog.convert.graph import MLX_GROUP_SIZES, Conversion, conversions_from
from catalog.convert.work import DEFAULT_GROUP_SIZE, ConversionWork, planned
from catalog.jobs import ENDED, Job
from catalog.models import ModelRecord
from core.errors import (
    InsufficientDisk,
    RequestError,
)
from core.settings import Settings
from deployments.jobs.catalog import CatalogReader
from deployments.jobs.conversions import KIND, is_made
from deployments.jobs.runner import JobRunner
from router.conversion_service import (
    ConversionChoice,
    ConversionTarget,
    ConversionTargets,
    ConversionWish,
    ForecastView,
)


class ConversionRequests:
    """Begins conversions on request; reads files and the catalog on threads."""

    def __init__(
        self,
        settings: Settings,
        backends: Mapping[str, Backend],
        catalog: CatalogReader,
        speeds: SpeedFile,
    ) -> None:
        self._models = settings.home / "models"
        self._limit_bytes = settings.conversion_disk
        self._backends = backends
        self._catalog = catalog
        self._speeds = speeds

    async def targets(self, name: str) -> ConversionTargets:
        """Return what a model can be converted to, with forecasts; see `Conversions`."""
        record = await self._catalog.source(name)
        return await asyncio.to_thread(self._targets, record)

    def _targets(self, record: ModelRecord) -> ConversionTargets:
        speeds = self._speeds.read()
        return ConversionTargets(
            model=record.id,
            targets=tuple(
                self._target(record.info, each, speeds) for each in conversions_from(record.info)
            ),
            used_bytes=converted_bytes(self._models),
            limit_bytes=self._limit_bytes,
            free_bytes=shutil.disk_usage(self._models.parent).free,
        )

    def _target(
        self,
        info: ModelInfo,
        conversion: Conversion,
        speeds: Mapping[str, Sequence[Measured]],
    ) -> ConversionTarget:
        target = conversion.target_format
        backend = self._backends.get(target)
        missing = "" if backend is None else backend.availability().reason
        if backend is None:
            missing = f"the format {target} is switched off; IMPETUS_FORMATS can enable it"
        choices = conversion.quantizations if conversion.is_possible else ()
        return ConversionTarget(
            format=target,
            reason=conversion.reason,
            runs_here=not missing,
            runs_here_reason=missing,
            choices=tuple(
                ConversionChoice(
                    quantization=each,
                    forecast=ForecastView(
                        **asdict(forecast(info, target, each, DEFAULT_GROUP_SIZE, speeds))
                    ),
                )
                for each in choices
            ),
            group_sizes=MLX_GROUP_SIZES if target == "mlx" and choices else (),
        )

    async def begin(self, wish: ConversionWish, runner: JobRunner) -> Job:
        """Return the job of a conversion, a new one or that which does the same already.

        Raises ModelNotFound, BrokenModel, and RequestError for what is not possible, a result that
        is there already, and one that has no room beside the others.
        """
        record = await self._catalog.source(wish.model)
        work = await asyncio.to_thread(
            planned,
            record.id,
            record.info,
            self._models,
            wish.format,
            quantization=wish.quantization,
            group_size=wish.group_size,
            name=wish.name,
        )
        active = active_conversions(runner)
        for job, other in active:
            if other.is_same_result(work) and (not wish.name or other.target == work.target):
                return job
        if any(other.target == work.target for _, other in active):
            raise RequestError(
                f"Another conversion writes to {work.target}; choose another name.", param="name"
            )
        await asyncio.to_thread(self.check_room, work, record)
        return runner.add(KIND, title_of(work), work.to_json())

    def check_room(self, work: ConversionWork, record: ModelRecord) -> None:
        """Raise RequestError for a result that is there, or that all others leave no room for."""
        if is_made(work):
            raise RequestError(
                f"{record.id} is converted to {work.kind} already: {work.target}. Delete that "
                "model first, or choose another name.",
                param="name",
            )
        if os.path.lexists(work.target):
            raise RequestError(
                f"{work.target} is there already and is not this conversion's; choose another "
                "name.",
                param="name",
            )
        expected = result_bytes(record.info, work.quantization, work.group_size)
        try:
            require_share(self._models, expected, self._limit_bytes)
        except InsufficientDisk as problem:
            raise RequestError(problem.message, param="model") from problem


def active_conversions(runner: JobRunner) -> list[tuple[Job, ConversionWork]]:
    """Return the conversions that are not over, with what each is to do."""
    return [
        (job, ConversionWork.from_json(job.work))
        for job in runner.jobs()
        if job.kind == KIND and job.state not in ENDED
    ]


def title_of(work: ConversionWork) -> str:
    """Return what a list of jobs calls a conversion."""
    return f"{work.model_id} to {work.kind}"
