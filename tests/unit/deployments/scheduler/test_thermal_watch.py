"""The watch over the machine's strain: who is told which limits, and when."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import EngineOptions
from backends.echo import echo_info
from backends.limits import UNLIMITED, EngineLimits
from core.errors import EngineFailed, Unavailable
from core.settings import Settings
from deployments.messages import LoadRequest
from deployments.replica.deployment import FormatReplica
from deployments.scheduler.thermal import SensorReader, ThermalWatch
from scheduler.thermal import FALL_S, RISE_S, Reading, ThermalState, directive
from tests.requests import request, run
from tests.unit.deployments.handles import FakeHandle, answering

UNKNOWN, NOMINAL, FAIR, SERIOUS, CRITICAL = ThermalState


class Machine:
    """A machine whose heat, clock and running formats the test sets."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "state"
        self.now = 1000.0
        self.running = {"gguf", "mlx"}
        self.handles = {
            name: FakeHandle(set_limits=answering(None)) for name in ("gguf", "mlx", "onnx")
        }
        self.settings = Settings(
            home=folder, thermal_file=self.file, max_sequences=8, prefill_chunk_tokens=512
        )

    def watch(self) -> ThermalWatch:
        async def running() -> frozenset[str]:
            return frozenset(self.running)

        handles: Any = self.handles
        return ThermalWatch(self.settings, handles, running=running, clock=lambda: self.now)

    def told(self, name: str) -> list[EngineLimits]:
        return [limits for (limits,) in self.handles[name].set_limits.calls]

    async def reach(self, watch: ThermalWatch, state: ThermalState) -> None:
        """Let the machine be in `state` for as long as the hysteresis asks."""
        self.file.write_text(state.label)
        for _ in range(2):
            await watch.poll()
            self.now += max(RISE_S, FALL_S)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def limits_of(state: ThermalState) -> EngineLimits:
    return directive(state, 8, 512).limits


async def test_running_formats_are_told_each_states_limits(machine: Machine) -> None:
    watch = machine.watch()
    for state in (NOMINAL, SERIOUS, CRITICAL, NOMINAL):
        await machine.reach(watch, state)
        assert watch.state is state
        assert machine.told("gguf")[-1] == machine.told("mlx")[-1] == limits_of(state)
        assert watch.admits == (state is not CRITICAL)
    assert watch.report.changes == 3
    assert watch.report.throttled_s > 0
    assert watch.retry_after_s > 0


async def test_a_format_that_does_not_run_is_never_called(machine: Machine) -> None:
    watch = machine.watch()
    for state in (SERIOUS, CRITICAL, NOMINAL):
        await machine.reach(watch, state)
    assert machine.told("onnx") == []


async def test_nominal_asks_nobody_anything_once_all_are_told(machine: Machine) -> None:
    watch = machine.watch()
    await machine.reach(watch, NOMINAL)
    assert machine.told("gguf") == [UNLIMITED]
    machine.running.add("onnx")
    await machine.reach(watch, FAIR)
    await machine.reach(watch, NOMINAL)
    assert machine.told("gguf") == [UNLIMITED]
    assert machine.told("onnx") == []
    assert not watch.directive.pauses_jobs


async def test_a_process_that_starts_while_hot_is_told(machine: Machine) -> None:
    watch = machine.watch()
    await machine.reach(watch, SERIOUS)
    machine.running.add("onnx")
    await watch.poll()
    assert machine.told("onnx") == [limits_of(SERIOUS)]


async def test_a_process_that_ended_while_hot_is_not_started_by_the_news(machine: Machine) -> None:
    watch = machine.watch()
    await machine.reach(watch, SERIOUS)
    machine.running.discard("mlx")
    await machine.reach(watch, NOMINAL)
    assert UNLIMITED in machine.told("gguf")
    assert UNLIMITED not in machine.told("mlx")


async def test_limits_that_did_not_arrive_are_sent_again(machine: Machine) -> None:
    watch = machine.watch()
    await machine.reach(watch, SERIOUS)
    failing = answering(None, EngineFailed("gone"), None)
    machine.handles["gguf"] = FakeHandle(set_limits=failing)
    await machine.reach(watch, NOMINAL)
    await watch.poll()
    await watch.poll()
    assert machine.told("gguf") == [limits_of(SERIOUS), UNLIMITED, UNLIMITED]
    assert machine.told("mlx")[-1] == UNLIMITED


async def test_f15_a_watch_that_starts_anew_takes_up_the_state_at_once(machine: Machine) -> None:
    machine.file.write_text("critical")
    watch = machine.watch()
    await watch.poll()
    assert watch.state is CRITICAL
    assert not watch.admits
    assert machine.told("gguf") == [limits_of(CRITICAL)]


async def test_a_watch_that_starts_anew_lifts_old_limits(machine: Machine) -> None:
    machine.file.write_text("nominal")
    await machine.watch().poll()
    assert machine.told("gguf") == machine.told("mlx") == [UNLIMITED]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("deployments.scheduler.thermal")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(logging.NOTSET)


async def test_f15_a_missing_sensor_throttles_nothing_and_is_logged_once(
    machine: Machine, log: pytest.LogCaptureFixture
) -> None:
    watch = machine.watch()
    for _ in range(5):
        await watch.poll()
    assert watch.state is UNKNOWN
    assert watch.admits
    assert set(machine.told("gguf")) <= {UNLIMITED}
    assert len({record.message for record in log.records}) == 1
    assert "no throttling" in log.records[0].message


class HungSensor:
    """Answers only once the gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls = 0

    def read(self) -> Reading:
        self.calls += 1
        self.gate.wait()
        return Reading(SERIOUS)


async def test_f15_a_hung_sensor_is_unknown_and_costs_one_thread() -> None:
    sensor = HungSensor()
    reader = SensorReader(sensor, 0.01)
    readings = [await reader.read() for _ in range(4)]
    assert {reading.state for reading in readings} == {UNKNOWN}
    assert all(reading.problems for reading in readings)
    assert sensor.calls == 1
    sensor.gate.set()
    while (reading := await reader.read()).state is UNKNOWN:
        pass
    assert reading.state is SERIOUS


async def test_a_sensor_that_raises_is_unknown() -> None:
    class Broken:
        def read(self) -> Reading:
            raise RuntimeError("no such device")

    reading = await SensorReader(Broken(), 10.0).read()
    assert reading.state is UNKNOWN
    assert "no such device" in reading.problems[0].message


class Panic(BaseException):
    """What a binding of the system's libraries raises."""


async def test_a_sensor_that_raises_anything_is_read_again() -> None:
    class Panics:
        reads = 0

        def read(self) -> Reading:
            self.reads += 1
            if self.reads == 1:
                raise Panic("no framework")
            return Reading()

    reader = SensorReader(Panics(), 10.0)
    assert "no framework" in (await reader.read()).problems[0].message
    assert not (await reader.read()).problems


async def test_a_thread_that_cannot_start_is_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Calm:
        def read(self) -> Reading:
            return Reading()

    def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    reader = SensorReader(Calm(), 10.0)
    with monkeypatch.context() as context:
        context.setattr("core.supervision.threading.Thread", no_thread)
        assert "can't start" in (await reader.read()).problems[0].message
    assert not (await reader.read()).problems


async def test_a_poll_that_fails_does_not_end_the_watch(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls: list[int] = []
    watch = machine.watch()

    async def poll() -> None:
        polls.append(1)
        if len(polls) == 1:
            raise RuntimeError("the controller is away")

    monkeypatch.setattr("deployments.scheduler.thermal.POLL_S", 0.0)
    monkeypatch.setattr(watch, "poll", poll)
    task = asyncio.ensure_future(watch.run())
    while len(polls) < 3:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class UnservedReplica(FormatReplica):
    """Serve awaits the coroutine that `__del__` is; the interpreter cannot."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FormatReplica:
    context: Any = SimpleNamespace(
        replica_id=SimpleNamespace(unique_id="replica"), get_node_id=lambda: "node"
    )
    monkeypatch.setattr("deployments.activity._SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr("deployments.replica.deployment.prepare_worker", lambda: None)
    monkeypatch.setattr("deployments.replica.deployment.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("deployments.replica.deployment.ray.get_runtime_context", lambda: context)
    return UnservedReplica("echo", Settings(home=tmp_path, prefix_ram=0, prefix_disk=0))


def order(model_id: str) -> LoadRequest:
    return LoadRequest(model_id, echo_info(), EngineOptions(max_sequences=4))


async def test_limits_reach_resident_models_and_those_loaded_later(replica: FormatReplica) -> None:
    await replica.load_model(order("early"))
    await replica.set_limits(limits_of(CRITICAL))
    await replica.load_model(order("late"))
    for model_id in ("early", "late"):
        with pytest.raises(Unavailable, match="no new requests"):
            await run(replica._loads._models[model_id].engine, request("hello"))
    await replica.set_limits(UNLIMITED)
    for model_id in ("early", "late"):
        assert await run(replica._loads._models[model_id].engine, request("hello"))
        assert await replica.unload_model(model_id)
