"""The quality of a result: which memory is leased for it, and what is no failure."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import ModelInfo
from catalog.convert.pause import PauseSwitch
from catalog.convert.quality.figure import QualityFigure
from catalog.convert.quality.measure import QualityLimits
from catalog.convert.work import ConversionWork
from core.errors import BrokenModel, Unavailable
from core.units import GIB, MIB
from deployments.jobs.quality import Comparison, QualityMeasurer
from tests.unit.deployments.jobs.conversion_doubles import FIGURE, ID, Memory, record

MODEL = record(info=replace(record().info, size_bytes=10 * GIB, parameters=5 * GIB))
WORK = ConversionWork(ID, "mlx", "4bit", 64, Path("/m"))


class Measurement:
    """Stands in for both child processes."""

    def __init__(self) -> None:
        self.outcome: Exception | None = None
        self.limits: list[QualityLimits] = []

    async def __call__(
        self, source: ModelInfo, result: Path, result_format: str, work: Path, **options: Any
    ) -> QualityFigure:
        assert (source, result_format) == (MODEL.info, "mlx")
        assert (result, work) == (Path("/result"), Path("/work"))
        self.limits.append(options["limits"])
        if self.outcome is not None:
            raise self.outcome
        return FIGURE


@pytest.fixture
def measurement(monkeypatch: pytest.MonkeyPatch) -> Measurement:
    measurement = Measurement()
    monkeypatch.setattr("deployments.jobs.quality.measure_quality", measurement)
    return measurement


async def measured(memory: Memory, budget_bytes: int, held_bytes: int) -> QualityFigure:
    granted: Any = memory
    both = Comparison("a1", MODEL, WORK, held_bytes, 2)
    measurer = QualityMeasurer(granted, budget_bytes)
    return await measurer.measure(both, Path("/result"), Path("/work"), PauseSwitch())


@pytest.mark.parametrize(
    ("budget_bytes", "held_bytes", "limit_bytes", "leased_bytes"),
    [
        # The larger of both models, and half a GiB.
        (64 * GIB, GIB, 12 * GIB + 512 * MIB, 11 * GIB + 512 * MIB),
        (8 * GIB, GIB, 8 * GIB, 7 * GIB),
        (64 * GIB, 20 * GIB, 12 * GIB + 512 * MIB, None),
    ],
    ids=["more is leased", "all there is", "the conversion holds enough"],
)
async def test_memory_is_leased_for_one_of_both_models(
    measurement: Measurement,
    budget_bytes: int,
    held_bytes: int,
    limit_bytes: int,
    leased_bytes: int | None,
) -> None:
    memory = Memory()
    assert await measured(memory, budget_bytes, held_bytes) is FIGURE
    assert [lease.needed_bytes for lease in memory.asked] == (
        [] if leased_bytes is None else [leased_bytes]
    )
    assert all(lease.lease_id == "a1-quality" for lease in memory.asked)
    assert memory.ended == len(memory.asked)
    (limits,) = measurement.limits
    assert (limits.memory_bytes, limits.threads) == (limit_bytes, 2)


async def test_without_memory_the_figure_has_the_reason(measurement: Measurement) -> None:
    memory = Memory(Unavailable("It did not become free."))
    figure = await measured(memory, 64 * GIB, GIB)
    assert figure == QualityFigure(reason="It was not measured: It did not become free.")
    assert measurement.limits == []


async def test_a_result_that_cannot_be_used_ends_its_conversion(measurement: Measurement) -> None:
    measurement.outcome = BrokenModel("It computes NaN.")
    memory = Memory()
    with pytest.raises(BrokenModel, match="NaN"):
        await measured(memory, 64 * GIB, GIB)
    assert memory.ended == 1
