"""What /metrics shows of other processes, and that it answers when they do not."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from core.errors import EngineFailed
from core.metrics import Metrics
from core.settings import Settings
from core.supervision import PartView, Supervisor
from deployments.decisions import KEPT_DECISIONS, DecisionLog
from deployments.messages import LedgerEntry, SchedulerSnapshot, ThermalView
from deployments.router import telemetry as telemetry_module
from deployments.router.telemetry import ReplicaTelemetry
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.publisher import Publisher
from deployments.scheduler.snapshot import take_snapshot
from deployments.scheduler.thermal import ThermalWatch
from scheduler.events import Configured, Loaded
from scheduler.scaling import ScalingDirective
from scheduler.state import HostState, KeepRules
from scheduler.thermal import Reading, SensorProblem, ThermalState
from tests.unit.deployments.handles import FakeHandle, answering

SNAPSHOT = SchedulerSnapshot(
    budget_bytes=1000,
    used_bytes=700,
    promised_bytes=300,
    residents=(LedgerEntry("m", 400, -5.0, format="echo"),),
    loading=("n",),
    waiting={"interactive": 2, "batch": 1},
    loads=3,
    load_failures=1,
    evictions=2,
    thermal=ThermalView("serious", 2, 4, 12.5, is_throttled=True),
)


async def nothing_runs() -> frozenset[str]:
    return frozenset()


def telemetry(scheduler: FakeHandle, **options: Any) -> ReplicaTelemetry:
    handle: Any = scheduler
    return ReplicaTelemetry({}, frozenset, handle, **{"running": nothing_runs, **options})


def shown(subject: ReplicaTelemetry) -> str:
    registry = CollectorRegistry()
    registry.register(subject)
    return generate_latest(registry).decode()


async def test_the_ledger_the_queue_and_the_thermal_state_are_shown() -> None:
    subject = telemetry(FakeHandle(snapshot=answering(SNAPSHOT)))
    await subject.refresh()
    lines = shown(subject).splitlines()
    for line in (
        "impetus_scheduler_up 1.0",
        "impetus_memory_budget_bytes 1000.0",
        "impetus_memory_used_bytes 700.0",
        "impetus_memory_promised_bytes 300.0",
        'impetus_model_resident_bytes{model="m"} 400.0',
        "impetus_loading_models 1.0",
        'impetus_scheduler_waiting_requests{priority="interactive"} 2.0',
        'impetus_scheduler_waiting_requests{priority="batch"} 1.0',
        "impetus_thermal_state 2.0",
        "impetus_throttled_seconds_total 12.5",
        "impetus_thermal_changes_total 4.0",
        "impetus_loads_total 3.0",
        "impetus_load_failures_total 1.0",
        "impetus_evictions_total 2.0",
    ):
        assert line in lines


async def hang(*arguments: Any) -> Any:
    del arguments
    await asyncio.Event().wait()


async def never() -> frozenset[str]:
    await asyncio.Event().wait()
    return frozenset()


async def broken() -> frozenset[str]:
    raise RuntimeError("no controller")


@pytest.mark.parametrize("scheduler", [hang, answering(EngineFailed("it died"))])
@pytest.mark.parametrize("running", [nothing_runs, never, broken])
async def test_metrics_come_without_the_scheduler_and_the_controller(
    scheduler: Any, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_module, "_LIMIT_S", 0.01)
    subject = telemetry(FakeHandle(snapshot=scheduler), running=running)
    await asyncio.wait_for(subject.refresh(), 20)
    text = shown(subject)
    assert "impetus_scheduler_up 0.0" in text
    assert "impetus_memory_budget_bytes" not in text
    assert 'impetus_process_pid{process="router"}' in text
    assert 'impetus_process_tasks{process="router"}' in text


def test_no_metric_is_exported_twice() -> None:
    metrics = Metrics()
    metrics.registry.register(telemetry(FakeHandle(snapshot=answering(SNAPSHOT))))
    names = [line.split()[2] for line in metrics.render().decode().splitlines() if "# TYPE" in line]
    assert len(names) == len(set(names))


def test_decisions_are_bounded_and_in_order() -> None:
    log = DecisionLog()
    for number in range(KEPT_DECISIONS + 10):
        log.record("parser mismatch", f"ignore {number}", "because")
    decisions = log.last()
    assert len(decisions) == KEPT_DECISIONS
    assert [one.action for one in decisions[:2]] == ["ignore 10", "ignore 11"]


class Nobody:
    """A ledger without replicas."""

    async def __call__(self, *arguments: Any) -> Any:
        del arguments
        return []


async def test_a_snapshot_has_the_ledgers_numbers() -> None:
    nobody: Any = Nobody()
    supervisor = Supervisor()
    ledger = Ledger(HostState(1000), nobody, nobody, nobody, DecisionLog(), supervisor)
    ledger._send(Configured("kept", KeepRules(is_pinned=True)))
    for model_id in ("kept", "free"):
        ledger._send(Loaded(model_id, 300, 0.1))
    now = ledger.state.residents[0].used_at + 60.0
    found = take_snapshot(ledger, ThermalWatch(Settings(), {}), now, tasks=7)
    supervisor.cancel()
    assert (found.budget_bytes, found.used_bytes, found.promised_bytes) == (1000, 600, 0)
    assert found.tasks == 7
    assert [(one.model_id, one.has_keep_rule) for one in found.residents] == [
        ("kept", True),
        ("free", False),
    ]
    assert found.residents[0].idle_s(found.taken_at) == pytest.approx(60.0)
    assert found.waiting == {"interactive": 0, "batch": 0}


class HotSensor:
    """A machine that is hot, on a low battery and without a sensor of memory pressure."""

    def read(self) -> Reading:
        return Reading(
            thermal=ThermalState.SERIOUS,
            battery=0.5,
            problems=(SensorProblem("memory", "no such file"),),
        )


async def test_snapshot_tells_what_heat_throttles_and_why() -> None:
    settings = Settings(max_sequences=16)
    watch = ThermalWatch(settings, {}, sensor=HotSensor(), running=nothing_runs)
    supervisor = Supervisor()
    await watch.poll()
    nobody: Any = Nobody()
    ledger = Ledger(HostState(1000), nobody, nobody, nobody, DecisionLog(), supervisor)
    found = take_snapshot(ledger, watch).thermal
    supervisor.cancel()
    assert (found.state, found.heat, found.memory_pressure) == ("serious", "serious", "unknown")
    assert found.reason == "the machine is hot (serious), the battery is at 50%"
    assert (found.max_sequences, found.prefill_chunk_tokens, found.decode_pause_s) == (8, 64, 0.02)
    assert found.pauses_jobs
    assert found.keeps_cool
    assert (found.battery, found.is_low_power) == (0.5, None)
    assert found.sensor_problems == ("memory: no such file",)


async def test_controller_is_not_asked_while_no_model_is_loaded() -> None:
    asked: list[int] = []

    async def running() -> frozenset[str]:
        asked.append(1)
        return frozenset({"echo"})

    await telemetry(FakeHandle(snapshot=answering(SNAPSHOT)), running=running).refresh()
    assert asked == []


class Published:
    """A publisher over a snapshot that the test sets, and a clock that it moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from backends.registry import backends_for

        monkeypatch.setattr("deployments.scheduler.publisher.RayMirror", FakeMirror)
        self.now = 1000.0
        self.snapshot = SchedulerSnapshot(budget_bytes=1 << 40)
        self.looks = 0
        self.written: list[ScalingDirective] = []
        self.publisher = Publisher(
            backends_for(["echo", "gguf"]),
            lambda: self.snapshot,
            self.look,
            300.0,
            write=self.written.append,
            clock=lambda: self.now,
        )

    async def look(self) -> None:
        self.looks += 1

    async def after(self, seconds: float, snapshot: SchedulerSnapshot) -> ScalingDirective:
        self.now += seconds
        self.snapshot = snapshot
        await self.publisher.publish()
        return self.written[-1]


class FakeMirror:
    def show(self, snapshot: SchedulerSnapshot) -> None:
        pass


def holding(idle_s: float, *, in_flight: int = 0, is_kept: bool = False) -> SchedulerSnapshot:
    resident = LedgerEntry("echo", 0, -idle_s, in_flight, is_pinned=is_kept, format="echo")
    return SchedulerSnapshot(budget_bytes=1 << 40, residents=(resident,))


async def test_a_format_may_end_once_its_models_were_idle_long_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published = Published(monkeypatch)
    empty = SchedulerSnapshot(budget_bytes=1 << 40)
    assert (await published.after(299.0, empty)).finished == ()
    assert (await published.after(1.0, empty)).finished == ("echo",)
    assert (await published.after(1.0, holding(0.0))).finished == ()
    assert (await published.after(100.0, holding(300.0))).finished == ()
    assert (await published.after(200.0, holding(300.0))).finished == ("echo",)
    assert (await published.after(1.0, holding(900.0, is_kept=True))).finished == ()
    assert (await published.after(1.0, holding(900.0, in_flight=1))).finished == ()


async def test_replicas_with_idle_models_are_asked_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published = Published(monkeypatch)
    await published.after(100.0, SchedulerSnapshot())
    assert published.looks == 0
    await published.after(1.0, holding(1.0))
    await published.after(59.0, holding(1.0))
    assert published.looks == 1
    await published.after(1.0, holding(1.0))
    assert published.looks == 2


async def test_formats_grow_only_with_memory_and_without_strain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published = Published(monkeypatch)
    assert (await published.after(1.0, SchedulerSnapshot(1 << 40))).growing == ("echo", "gguf")
    assert (await published.after(1.0, SchedulerSnapshot(1 << 40, 1 << 40))).growing == ()
    hot = ThermalView("critical", 3, admits=False, is_throttled=True, unloads_idle=True)
    strained = await published.after(1.0, SchedulerSnapshot(1 << 40, thermal=hot))
    assert strained == ScalingDirective(False, (), ("echo",))
    count = len(published.written)
    await published.after(1.0, SchedulerSnapshot(1 << 40, thermal=hot))
    assert len(published.written) == count


async def test_background_tasks_of_both_processes_are_shown() -> None:
    theirs = (
        PartView("publisher", "failing", 7, "OSError: no space left"),
        PartView("memory ledger", "running", 1),
        PartView("memory ledger", "restarting", 2),
    )
    snapshot = replace(SNAPSHOT, parts=theirs)
    subject = telemetry(
        FakeHandle(snapshot=answering(snapshot)),
        own_parts=lambda: [PartView("listener", "running")],
    )
    await subject.refresh()
    lines = shown(subject).splitlines()
    for line in (
        'impetus_part_up{part="listener",process="router"} 1.0',
        'impetus_part_up{part="publisher",process="scheduler"} 0.0',
        'impetus_part_failures_total{part="publisher",process="scheduler"} 7.0',
        'impetus_part_up{part="memory ledger",process="scheduler"} 0.0',
        'impetus_part_failures_total{part="memory ledger",process="scheduler"} 3.0',
    ):
        assert line in lines
