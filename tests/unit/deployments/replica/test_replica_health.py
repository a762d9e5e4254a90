"""A replica's own watch over its engines, and what its models really hold."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import EngineOptions
from backends.echo import EchoBackend, echo_info
from backends.engine.batching import BatchingEngine
from core.errors import EngineFailed, TimedOut
from core.units import MIB
from deployments.messages import LoadRequest, UnloadResult
from deployments.replica.deployment import FormatReplica
from deployments.replica.memory import ModelMemory
from tests.requests import request, run
from tests.unit.backends.engine.test_batching import FakeStepper, open_engine, until

ORDER = LoadRequest("m", echo_info(), EngineOptions(), step_limit_s=60.0)


async def test_f3_a_step_that_does_not_return_fails_the_health_check(
    replica: FormatReplica,
) -> None:
    await replica.load_model(ORDER)
    await replica.check_health()
    engine: Any = replica._loads._models["m"].engine
    assert engine.stalled_s == 0.0
    engine._loop.watch._began_at["step"] = -1e9
    with pytest.raises(EngineFailed, match="A step or preparation of m has not returned"):
        await replica.check_health()
    engine._loop.watch.end("step")
    await replica.unload_model("m")


async def test_a_lock_that_gives_no_turns_fails_the_health_check(replica: FormatReplica) -> None:
    accelerator: Any = SimpleNamespace(problem="The thread has ended.")
    replica._accelerator = accelerator
    with pytest.raises(EngineFailed, match="thread has ended"):
        await replica.check_health()


async def test_f3_requests_of_a_hung_engine_end_at_their_deadline() -> None:
    stepper = FakeStepper(max_sequences=1)
    stepper.gate.clear()
    engine: BatchingEngine = open_engine(stepper)
    hung = asyncio.ensure_future(run(engine, request("a", deadline_s=0.05)))
    await until(stepper.stepping.is_set)
    waiting = asyncio.ensure_future(run(engine, request("b", deadline_s=0.05)))
    assert engine.stalled_s >= 0.0
    for task in (hung, waiting):
        with pytest.raises(TimedOut) as caught:
            await task
        assert (caught.value.status, caught.value.code) == (504, "timed_out")
    stepper.gate.set()
    await engine.close()


class Meter:
    """A process whose footprint the test sets."""

    def __init__(self, *readings: int | None) -> None:
        self._readings = list(readings)

    def read(self) -> int | None:
        return self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]


async def nothing() -> None:
    """Close nothing."""


async def test_a_model_that_came_back_whole_is_accounted_for() -> None:
    memory = ModelMemory(EchoBackend(), Meter(100 * MIB, 140 * MIB, 140 * MIB, 101 * MIB))
    assert await memory.measure_open(ORDER, lambda: "engine") == "engine"
    assert memory.measured_bytes("m") == 40 * MIB
    freed = await memory.measure_close("m", nothing)
    assert freed == UnloadResult(40 * MIB, 39 * MIB, 0, is_known=True)
    assert freed.summary == "39.0 MiB of 40.0 MiB came back"


@pytest.mark.parametrize(
    ("after", "returned"),
    [
        # The driver gives the memory back late, within the wait; or not at all.
        ([140, 140, 120, 101, 50], 39),
        ([140], 0),
        ([101, 50], 39),
    ],
)
async def test_memory_that_macos_gives_back_late_is_waited_for(
    after: list[int], returned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("deployments.replica.memory._SETTLE_STEP_S", 0.0005)
    monkeypatch.setattr("deployments.replica.memory._SETTLE_S", 0.005)
    readings = [100, 140, 140, *after]
    memory = ModelMemory(EchoBackend(), Meter(*(each * MIB for each in readings)))
    await memory.measure_open(ORDER, lambda: None)
    freed = await memory.measure_close("m", nothing)
    assert freed.returned_bytes == returned * MIB


async def test_what_does_not_come_back_is_told_as_kept() -> None:
    size = 600 * MIB
    memory = ModelMemory(EchoBackend(), Meter(0, size, size, size))
    await memory.measure_open(ORDER, lambda: None)
    freed = await memory.measure_close("m", nothing)
    assert freed.kept_bytes == memory.kept_bytes == size - 256 * MIB
    assert "its process keeps 344.0 MiB" in freed.summary


async def test_a_system_that_says_nothing_leaves_the_estimates_alone() -> None:
    memory = ModelMemory(EchoBackend(), Meter(None))
    await memory.measure_open(ORDER, lambda: None)
    memory.sample({"m"})
    assert (memory.measured_bytes("m"), memory.kept_bytes) == (0, 0)
    assert await memory.measure_close("m", nothing) == UnloadResult()


async def test_reports_name_the_process_and_its_models(replica: FormatReplica) -> None:
    await replica.load_model(ORDER)
    report = await replica.report()
    assert [one.replica_id for one in report.processes] == ["replica"]
    assert [one.model_id for one in report.residents] == ["m"]
    assert await replica.unload_model("gone") is None
    assert isinstance(await replica.unload_model("m"), UnloadResult)
