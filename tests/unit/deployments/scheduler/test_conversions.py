"""A model that cannot run here is converted once, and whoever asks is told so."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import Availability, Backend, EngineOptions, MemoryEstimate, ModelInfo
from backends.registry import backends_for
from catalog.convert.graph import Conversion
from catalog.convert.pause import PauseSwitch
from catalog.convert.run import ConversionProgress, ConversionRequest
from catalog.models import Converted, Local, ModelRecord
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    ImpetusError,
    InsufficientMemory,
    Unavailable,
)
from core.settings import Settings
from deployments.scheduler.conversions import Conversions
from tests.unit.catalog.builders import make_info
from tests.waiting import wait_until

MISSING = BackendUnavailable("The format x cannot run here.")
TOO_LARGE = InsufficientMemory("It needs 9 GiB.")
HELD_BYTES = 123


class Converter:
    """Stands in for the conversion itself: waits for the gate, then ends as it is told."""

    def __init__(self) -> None:
        self.requests: list[ConversionRequest] = []
        self.gate = asyncio.Event()
        self.outcome: Exception | None = None

    async def __call__(
        self,
        request: ConversionRequest,
        note: Callable[[ConversionProgress], None],
        pause: PauseSwitch,
        on_memory: Callable[[int], None],
    ) -> Path:
        self.requests.append(request)
        self.pause = pause
        on_memory(HELD_BYTES)
        note(ConversionProgress(0.25, 1, 1, "reading"))
        await self.gate.wait()
        if self.outcome is not None:
            raise self.outcome
        return request.target


class Rescan:
    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    converter = Converter()
    monkeypatch.setattr("deployments.scheduler.conversions.convert", converter)
    monkeypatch.setattr(
        "catalog.convert.choice.conversions_from",
        lambda info: tuple(
            Conversion(name, ("4bit", "8bit", "6bit") if name == "mlx" else ("q4_k_m", "f16"))
            for name in ("safetensors", "gguf", "mlx")
            if name != info.format
        ),
    )
    return converter


class Runnable(Backend):
    """A format that can or cannot run here; nothing else of it is asked for."""

    def __init__(self, is_available: bool) -> None:
        self._is_available = is_available

    def availability(self) -> Availability:
        return Availability(self._is_available)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        del options
        if info.size_bytes > 5 * 10**9:
            raise TOO_LARGE
        return MemoryEstimate(info.size_bytes, 0, 0, 1024, 1024)

    identify: Any = None
    open: Any = None


Runnable.__abstractmethods__ = frozenset()


class Held:
    """Grants memory, or refuses it; notes what was asked for and what was measured."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal = refusal
        self.asked: list[tuple[str, int]] = []
        self.measured: list[int] = []
        self.ended = 0

    @asynccontextmanager
    async def __call__(
        self, name: str, needed_bytes: int, timeout_s: float
    ) -> AsyncIterator[Callable[[int], None]]:
        assert timeout_s > 0
        self.asked.append((name, needed_bytes))
        if self.refusal is not None:
            raise self.refusal
        try:
            yield self.measured.append
        finally:
            self.ended += 1


def conversions(
    tmp_path: Path, rescan: Rescan, *, is_on: bool = True, held: Held | None = None
) -> Conversions:
    settings = Settings(home=tmp_path, auto_convert=is_on, threads=1)
    backends: dict[str, Backend] = {
        **backends_for(["gguf"]),
        "mlx": Runnable(True),
        "safetensors": Runnable(False),
    }
    return Conversions(settings, backends, EngineOptions(), rescan, held or Held())


def record(**changes: Any) -> ModelRecord:
    info = make_info("/m/model.safetensors")
    info = replace(
        info,
        format="safetensors",
        name="m",
        size_bytes=16 * 10**9,
        parameters=8 * 10**9,
        quantization="bf16",
    )
    return ModelRecord(
        "m@safetensors-bf16", info, changes.pop("source", Local("/m")), "1:", 0.0, **changes
    )


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0.001)


async def test_the_first_request_starts_it_and_all_are_told(
    tmp_path: Path, converter: Converter
) -> None:
    rescan = Rescan()
    chosen = conversions(tmp_path, rescan)
    first = chosen.answer(record(), MISSING, [])
    assert isinstance(first, Unavailable)
    assert "being converted to mlx" in first.message
    await settle()
    second = chosen.answer(record(), MISSING, [])
    assert "25%" in second.message
    assert second.retry_after_s is not None
    assert second.retry_after_s >= 1
    converter.gate.set()
    await settle()
    assert len(converter.requests) == 1
    assert converter.requests[0].model_id == "m@safetensors-bf16"
    assert converter.requests[0].target == tmp_path / "models" / "mlx-4bit" / "m"
    assert rescan.count == 1


async def test_f15_nothing_begins_while_conversions_are_paused(
    tmp_path: Path, converter: Converter
) -> None:
    chosen = conversions(tmp_path, Rescan())
    chosen.pause(is_on=True)
    told = chosen.answer(record(), MISSING, [])
    assert "paused until the machine has recovered" in told.message
    await settle()
    assert not converter.requests
    chosen.pause(is_on=False)
    converter.gate.set()
    await settle()
    assert len(converter.requests) == 1
    assert not converter.pause.is_on


async def test_a_model_over_the_memory_becomes_the_largest_that_fits(
    tmp_path: Path, converter: Converter
) -> None:
    chosen = conversions(tmp_path, Rescan())
    chosen.answer(record(), TOO_LARGE, [])
    await settle()
    # Eight billion weights: 8.5 GB, 6.5 GB or 4.5 GB, and 5 GB are allowed.
    assert converter.requests[0].quantization == "4bit"
    converter.gate.set()
    await settle()


@pytest.mark.parametrize(
    "failure",
    [BrokenModel("It is damaged."), RuntimeError("It is damaged.")],
    ids=["ours", "other"],
)
async def test_a_failure_is_told_and_not_repeated(
    tmp_path: Path, converter: Converter, failure: Exception
) -> None:
    chosen = conversions(tmp_path, Rescan())
    converter.outcome = failure
    converter.gate.set()
    chosen.answer(record(), MISSING, [])
    await settle()
    answer = chosen.answer(record(), MISSING, [])
    assert isinstance(answer, BackendUnavailable)
    assert "conversion failed: It is damaged." in answer.message
    assert len(converter.requests) == 1


@pytest.mark.parametrize(
    ("changes", "problem", "is_on"),
    [
        ({}, MISSING, False),
        ({"source": Converted("/m", "other")}, MISSING, True),
        ({}, BrokenModel("It is damaged."), True),
    ],
    ids=["switched off", "already converted", "nothing that conversion helps"],
)
async def test_otherwise_the_problem_itself_is_told(
    tmp_path: Path,
    converter: Converter,
    changes: dict[str, Any],
    problem: ImpetusError,
    is_on: bool,
) -> None:
    chosen = conversions(tmp_path, Rescan(), is_on=is_on)
    assert chosen.answer(record(**changes), problem, []) is problem
    await settle()
    assert converter.requests == []


async def test_what_was_converted_and_cannot_run_either_is_not_converted_again(
    tmp_path: Path, converter: Converter
) -> None:
    chosen = conversions(tmp_path, Rescan())
    former = replace(record(source=Converted("/m", "m@safetensors-bf16")), id="m@mlx-4bit")
    answer = chosen.answer(record(), TOO_LARGE, [record(), former])
    assert isinstance(answer, InsufficientMemory)
    assert "m@mlx-4bit" in answer.message
    await settle()
    assert converter.requests == []


async def test_memory_is_held_while_it_runs(tmp_path: Path, converter: Converter) -> None:
    held = Held()
    chosen = conversions(tmp_path, Rescan(), held=held)
    chosen.answer(record(), MISSING, [])
    await settle()
    ((name, needed_bytes),) = held.asked
    assert name == "conversion of m@safetensors-bf16"
    # Eight billion parameters are in memory at once on the way.
    assert needed_bytes > 4 * 10**9
    assert held.measured == [HELD_BYTES]
    assert held.ended == 0
    converter.gate.set()
    await settle()
    assert held.ended == 1


async def test_without_memory_it_is_refused_with_the_reason(
    tmp_path: Path, converter: Converter
) -> None:
    chosen = conversions(tmp_path, Rescan(), held=Held(InsufficientMemory("It needs 9 GiB.")))
    chosen.answer(record(), MISSING, [])
    await settle()
    told = chosen.answer(record(), MISSING, [])
    assert "conversion failed: It needs 9 GiB." in told.message
    assert converter.requests == []


def chained(problem: OSError) -> ImpetusError:
    error = ImpetusError("The step failed.")
    error.__cause__ = problem
    return error


@pytest.mark.parametrize(
    ("failure", "is_repeated"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (chained(OSError(errno.ENOSPC, "No space left on device")), True),
        (Unavailable("The memory did not become free."), True),
        (BrokenModel("It is damaged."), False),
        (RuntimeError("a bug"), False),
    ],
)
async def test_a_passing_trouble_is_tried_again_sooner(
    tmp_path: Path,
    converter: Converter,
    failure: Exception,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_repeated: bool,
) -> None:
    monkeypatch.setattr("deployments.scheduler.conversions._PASSING_KEPT_S", -1.0)
    chosen = conversions(tmp_path, Rescan())
    converter.outcome = failure
    converter.gate.set()
    chosen.answer(record(), MISSING, [])
    await wait_until(lambda: not chosen._running, "the conversion has failed")
    chosen.answer(record(), MISSING, [])
    await wait_until(lambda: not chosen._running, "the conversion has ended")
    assert len(converter.requests) == (2 if is_repeated else 1)


async def test_cancel_ends_what_runs(tmp_path: Path, converter: Converter) -> None:
    chosen = conversions(tmp_path, Rescan())
    chosen.answer(record(), MISSING, [])
    await settle()
    chosen.cancel()
    await settle()
    assert len(converter.requests) == 1
    assert chosen._running == {}
