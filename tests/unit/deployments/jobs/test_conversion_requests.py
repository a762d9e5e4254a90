"""What may be converted, conversions that users begin, and those that requests tell of or begin."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import Availability, Backend, EngineOptions, MemoryEstimate, ModelInfo
from backends.registry import backends_for
from catalog.convert.forecast import Measured, SpeedFile
from catalog.convert.graph import Conversion
from catalog.convert.work import ConversionWork
from catalog.job_store import JobStore
from catalog.jobs import JobLimits
from catalog.models import Converted
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    ConversionNeeded,
    ImpetusError,
    InsufficientMemory,
    ModelNotFound,
    RequestError,
    Unavailable,
    UnsupportedCapability,
)
from core.settings import Settings
from deployments.jobs.conversion_requests import ConversionRequests
from deployments.jobs.conversions import ConversionJobs
from deployments.jobs.runner import JobRunner
from deployments.jobs.unrunnable import UnrunnableModels
from router.conversion_service import ConversionWish
from tests.unit.deployments.jobs.conversion_doubles import (
    ID,
    Converter,
    Library,
    Memory,
    Quality,
    place,
    record,
)
from tests.waiting import wait_until

MISSING = BackendUnavailable("The format x cannot run here.")
TOO_LARGE = InsufficientMemory("It needs 9 GiB.")


class Runnable(Backend):
    """A format that can or cannot run here; nothing else of it is asked for."""

    def __init__(self, is_available: bool) -> None:
        self._is_available = is_available

    def availability(self) -> Availability:
        return Availability(self._is_available, "" if self._is_available else "it needs a Mac")

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        del options
        if info.size_bytes > 5 * 10**9:
            raise TOO_LARGE
        return MemoryEstimate(info.size_bytes, 0, 0, 1024, 1024)

    identify: Any = None
    open: Any = None


Runnable.__abstractmethods__ = frozenset()


class Desk:
    """Requests for conversions over a runner whose conversions are stand-ins."""

    def __init__(self, home: Path, *, is_on: bool, **options: Any) -> None:
        self.settings = Settings(home=home, auto_convert=is_on, threads=1, **options)
        self.library = Library(record())
        self.now = 1000.0
        library: Any = self.library
        memory: Any = Memory()
        self.speeds = SpeedFile(home / "speeds.json")
        quality: Any = Quality()
        self.handler = ConversionJobs(self.settings, library, memory, self.speeds, quality)
        self.store = JobStore(home / "jobs.sqlite")
        self.held: dict[str, str] = {}
        self.runner = JobRunner(
            self.store,
            {"conversion": self.handler},
            lambda: JobLimits(held=self.held),
            clock=lambda: self.now,
        )
        backends: dict[str, Backend] = {
            **backends_for(["gguf"]),
            "mlx": Runnable(True),
            "safetensors": Runnable(False),
        }
        self.requests = ConversionRequests(self.settings, backends, library, self.speeds)
        self.unrunnable = UnrunnableModels(
            self.settings,
            backends,
            EngineOptions(),
            library,
            self.handler,
            self.requests,
            self.speeds,
            lambda: self.now,
        )

    async def answer(self, problem: ImpetusError = MISSING) -> ImpetusError:
        return await self.unrunnable.answer(ID, problem, self.runner)

    async def begin(self, **wish: Any) -> ConversionWork:
        """Begin a conversion, and return what its job is to do."""
        fields = {"model": ID, "format": "mlx", **wish}
        job = await self.requests.begin(ConversionWish(**fields), self.runner)
        return ConversionWork.from_json(job.work)

    async def until(self, state: str) -> None:
        await wait_until(
            lambda: [job.state for job in self.runner.jobs()][-1:] == [state], f"it is {state}"
        )


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    converter = Converter()
    monkeypatch.setattr("deployments.jobs.conversions.convert", converter)
    choices = {"mlx": ("4bit", "8bit", "6bit"), "coreml": ()}

    def conversion(info: ModelInfo, target: str) -> Conversion:
        del info
        reason = "it needs the packages coremltools" if target == "coreml" else ""
        return Conversion(target, choices.get(target, ("q4_k_m", "f16")), reason)

    monkeypatch.setattr("catalog.convert.graph._conversion", conversion)
    return converter


@pytest.fixture
async def desk(tmp_path: Path, converter: Converter) -> AsyncIterator[Desk]:
    async for one in opened(tmp_path, converter, is_on=False):
        yield one


@pytest.fixture
async def automatic(tmp_path: Path, converter: Converter) -> AsyncIterator[Desk]:
    async for one in opened(tmp_path, converter, is_on=True):
        yield one


async def opened(home: Path, converter: Converter, **options: Any) -> AsyncIterator[Desk]:
    """Yield a desk whose jobs run."""
    del converter
    desk = Desk(home, **options)
    running = asyncio.ensure_future(desk.runner.run())
    await desk.runner.wait_until_loaded()
    yield desk
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await desk.handler.close()
    desk.store.close()


async def test_what_is_possible_is_shown_with_forecasts_and_what_is_not_with_its_reason(
    desk: Desk,
) -> None:
    desk.speeds.add("safetensors>mlx", Measured(8 * 10**9, 100.0))
    found = await desk.requests.targets(ID)
    assert (found.model, found.used_bytes, found.limit_bytes) == (ID, 0, 100 * 2**30)
    assert found.free_bytes > 0
    by_format = {one.format: one for one in found.targets}
    mlx, gguf, coreml = by_format["mlx"], by_format["gguf"], by_format["coreml"]
    assert [one.quantization for one in mlx.choices] == ["4bit", "8bit", "6bit"]
    assert (mlx.runs_here, mlx.group_sizes) == (True, (32, 64, 128))
    first = mlx.choices[0].forecast
    assert (first.seconds, first.is_measured) == (200.0, True)
    assert first.result_bytes == int(8e9 * 4.5 / 8)
    assert not gguf.choices[0].forecast.is_measured
    assert gguf.group_sizes == ()
    assert (coreml.reason, coreml.choices) == ("it needs the packages coremltools", ())
    assert "IMPETUS_FORMATS" in coreml.runs_here_reason
    assert by_format["safetensors"].runs_here_reason == "it needs a Mac"
    with pytest.raises(ModelNotFound):
        await desk.requests.targets("unknown")


async def test_a_second_request_for_the_same_conversion_joins_the_first(desk: Desk) -> None:
    work = await desk.begin()
    assert work.target == desk.settings.home / "models" / "mlx-4bit" / "m"
    assert await desk.begin(quantization="4bit", group_size=64) == work
    assert len(desk.runner.jobs()) == 1
    other = await desk.begin(name="mine")
    assert other.target.name == "mine"
    assert await desk.begin(name="mine") == other
    assert len(desk.runner.jobs()) == 2


@pytest.mark.parametrize(
    ("wish", "error", "told"),
    [
        ({"model": "unknown"}, ModelNotFound, "unknown"),
        ({"format": "coreml"}, UnsupportedCapability, "it needs the packages coremltools"),
        ({"format": "zip"}, UnsupportedCapability, "not a target format"),
        ({"quantization": "q8_0"}, UnsupportedCapability, "not one of 4bit"),
        ({"group_size": 65}, RequestError, "supports 32, 64 and 128"),
        ({"name": "../../etc"}, RequestError, "not a name for a converted model"),
    ],
)
async def test_what_cannot_be_converted_is_refused_with_the_reason(
    desk: Desk, wish: dict[str, Any], error: type[ImpetusError], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        await desk.begin(**wish)
    assert caught.value.status in (400, 404)
    assert desk.runner.jobs() == []


async def test_a_result_that_is_there_is_refused(desk: Desk, converter: Converter) -> None:
    converter.gate.set()
    await desk.begin()
    await desk.until("done")
    with pytest.raises(RequestError, match=r"is converted to mlx-4bit already: .*mlx-4bit/m"):
        await desk.begin()
    foreign = desk.settings.home / "models" / "mlx-8bit" / "m"
    foreign.mkdir(parents=True)
    with pytest.raises(RequestError, match="is there already and is not this conversion's"):
        await desk.begin(quantization="8bit")


async def test_all_results_together_are_bounded(tmp_path: Path, converter: Converter) -> None:
    async for desk in opened(tmp_path, converter, is_on=True, conversion_disk=5 * 10**9):
        with pytest.raises(RequestError, match=r"about 7\.9 GiB .* allows 4\.7 GiB") as caught:
            await desk.begin(quantization="8bit")
        assert caught.value.status == 400
        # The first choice has room.
        assert isinstance(await desk.answer(), Unavailable)
        place(await requested(converter))
        (desk.settings.home / "models" / "mlx-4bit" / "m" / "w").write_bytes(bytes(10**6))
        with pytest.raises(RequestError, match=r"converted models of 976\."):
            await desk.begin(quantization="6bit", name="other")


async def requested(converter: Converter) -> Any:
    await wait_until(lambda: converter.requests, "it converts")
    return converter.requests[0]


async def test_by_default_a_request_is_told_which_conversion_helps_and_how_to_start_it(
    desk: Desk, converter: Converter
) -> None:
    told = await desk.answer()
    assert isinstance(told, ConversionNeeded)
    assert (told.code, told.status, told.param) == ("conversion_needed", 400, "model")
    assert told.message.startswith("The format x cannot run here. It can be converted to mlx 4bit")
    assert "about 7 minutes (estimated), 4.2 GiB of disk space and" in told.message
    assert (
        'POST /api/convert with {"model": "m@safetensors-bf16", "format": "mlx", '
        '"quantization": "4bit"}'
    ) in told.message
    assert "scripts/models convert m@safetensors-bf16 --to mlx --quantization 4bit" in told.message
    assert "IMPETUS_AUTO_CONVERT=true" in told.message
    assert (desk.runner.jobs(), converter.requests) == ([], [])
    # Once somebody has begun it, requests wait for it.
    await desk.begin()
    await requested(converter)
    told = await desk.answer()
    assert isinstance(told, Unavailable)
    assert "It is being converted to mlx 4bit (reading, 25%)" in told.message
    assert told.retry_after_s is not None
    assert 1 <= told.retry_after_s <= 120


async def test_with_the_setting_the_first_request_begins_it_and_all_are_told(
    automatic: Desk, converter: Converter
) -> None:
    first = await automatic.answer()
    assert isinstance(first, Unavailable)
    assert "being converted to mlx" in first.message
    request = await requested(converter)
    second = await automatic.answer()
    assert "25%" in second.message
    converter.gate.set()
    await automatic.until("done")
    assert len(converter.requests) == 1
    assert request.model_id == ID
    (job,) = automatic.runner.jobs()
    assert ConversionWork.from_json(job.work).is_awaited
    assert automatic.library.registered == [request.target]


async def test_f15_one_that_is_held_back_is_told_with_the_reason(
    automatic: Desk, converter: Converter
) -> None:
    await automatic.answer()
    await requested(converter)
    automatic.held = {"conversion": "the machine is hot"}
    automatic.runner.look_again()
    await automatic.until("waiting")
    told = await automatic.answer()
    assert "(the machine is hot, 25%)" in told.message
    await wait_until(lambda: converter.pauses[0].is_on, "its processes are stopped")
    automatic.held = {}
    automatic.runner.look_again()
    await automatic.until("running")
    converter.gate.set()
    await automatic.until("done")
    assert len(converter.requests) == 1


async def test_a_model_over_the_memory_becomes_the_largest_that_fits(
    automatic: Desk, converter: Converter
) -> None:
    await automatic.answer(TOO_LARGE)
    # Eight billion weights: 8.5 GB, 6.5 GB or 4.5 GB, and 5 GB are allowed.
    assert (await requested(converter)).quantization == "4bit"


@pytest.mark.parametrize("is_on", [False, True], ids=["asks", "automatic"])
async def test_a_failure_is_told_and_not_repeated_for_a_while(
    tmp_path: Path, converter: Converter, *, is_on: bool
) -> None:
    converter.outcome = BrokenModel("It is damaged.")
    converter.gate.set()
    async for desk in opened(tmp_path, converter, is_on=is_on):
        await desk.begin()
        await desk.until("failed")
        told = await desk.answer()
        assert isinstance(told, BackendUnavailable if is_on else ConversionNeeded)
        assert "conversion failed: It is damaged." in told.message
        desk.now += 700
        told = await desk.answer()
        assert "It is damaged" not in told.message
        if is_on:
            await wait_until(lambda: len(converter.requests) == 2, "it is tried again")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"source": Converted("/m", "other")}, MISSING),
        ({}, BrokenModel("It is damaged.")),
        ({"format": "onnx"}, MISSING),
    ],
    ids=["already converted", "nothing that conversion helps", "its format is switched off"],
)
async def test_otherwise_the_problem_itself_is_told(
    automatic: Desk, converter: Converter, changes: dict[str, Any], problem: ImpetusError
) -> None:
    model = record(source=changes["source"]) if "source" in changes else record()
    info = replace(model.info, format=changes.get("format", "safetensors"))
    automatic.library.all = [replace(model, info=info)]
    assert await automatic.answer(problem) is problem
    assert (automatic.runner.jobs(), converter.requests) == ([], [])


async def test_what_was_converted_and_cannot_run_either_is_not_converted_again(
    automatic: Desk, converter: Converter
) -> None:
    former = replace(record(source=Converted("/m", ID)), id="m@mlx-4bit")
    automatic.library.all.append(former)
    answer = await automatic.answer(TOO_LARGE)
    assert isinstance(answer, InsufficientMemory)
    assert "m@mlx-4bit" in answer.message
    assert (automatic.runner.jobs(), converter.requests) == ([], [])
