"""Measures the quality of conversions, with memory for one of both models at a time."""

import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from catalog.convert.disk import result_bytes
from catalog.convert.pause import PauseSwitch
from catalog.convert.quality.figure import QualityFigure
from catalog.convert.quality.measure import QualityLimits, measure_quality
from catalog.convert.work import ConversionWork
from catalog.models import ModelRecord
from core.errors import BrokenModel, ImpetusError
from core.units import MIB
from deployments.jobs.memory import MemoryLeases
from deployments.messages import MemoryLease

logger = logging.getLogger(__name__)

# Beside the weights: libraries, the text's states and logits.
_BASE_BYTES = 512 * MIB
_PER_WEIGHT_BYTE = 1.2


@dataclass(frozen=True, slots=True)
class Comparison:
    """A result to be compared with its source; its conversion still holds `held_bytes`."""

    job_id: str
    source: ModelRecord
    work: ConversionWork
    held_bytes: int
    threads: int


class QualityMeasurer:
    """Measures within `budget_bytes`, what the models of this machine may take together."""

    def __init__(self, memory: MemoryLeases, budget_bytes: int) -> None:
        self._memory = memory
        self._budget_bytes = budget_bytes

    async def measure(
        self, comparison: Comparison, result: Path, folder: Path, pause: PauseSwitch
    ) -> QualityFigure:
        """Return how the model in the folder `result` differs from its source.

        `folder` is for temporary files.  What cannot be measured is no failure: the figure has the
        reason.  Raises BrokenModel for a result that cannot be used.
        """
        source, work = comparison.source, comparison.work
        made = result_bytes(source.info, work.quantization, work.group_size)
        largest = max(source.info.size_bytes, made)
        wanted = min(int(largest * _PER_WEIGHT_BYTE) + _BASE_BYTES, self._budget_bytes)
        limits = QualityLimits(memory_bytes=wanted, threads=comparison.threads)
        name = f"quality of {source.id} as {work.kind}"
        more = wanted - comparison.held_bytes
        lease = MemoryLease(f"{comparison.job_id}-quality", name, source.id, more)
        try:
            async with AsyncExitStack() as held:
                if more > 0:
                    await held.enter_async_context(self._memory.held(lease))
                return await measure_quality(
                    source.info,
                    result,
                    work.target_format,
                    folder,
                    limits=limits,
                    pause=pause,
                )
        except BrokenModel:
            raise
        except ImpetusError as problem:
            logger.info("the %s was not measured: %s", name, problem.message)
            return QualityFigure(reason=f"It was not measured: {problem.message}")
