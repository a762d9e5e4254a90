"""What is sampled for charts, from the reports of other processes and this one's metrics."""

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from backends.base import EngineLoad
from core.errors import Unavailable
from core.metrics import Metrics
from core.settings import Settings
from core.types import Usage
from deployments.messages import (
    LedgerEntry,
    ModelUsage,
    NodeMemory,
    ProcessReport,
    ReplicaReport,
    SchedulerSnapshot,
    ThermalView,
)
from deployments.router.monitor.sampler import ProcessorUse, ServerMonitor
from router.monitor.history import History

HOT = ThermalView(
    "serious",
    2,
    4,
    12.5,
    is_throttled=True,
    pauses_jobs=True,
    keeps_cool=True,
    max_sequences=8,
    prefill_chunk_tokens=64,
    decode_pause_s=0.02,
    reason="the machine is hot (serious)",
    heat="serious",
    memory_pressure="nominal",
    battery=0.5,
    sensor_problems=("power: none",),
)
SNAPSHOT = SchedulerSnapshot(
    budget_bytes=1000,
    used_bytes=700,
    residents=(LedgerEntry("m", 400, 0.0, format="echo"), LedgerEntry("j", 300, 0.0, is_job=True)),
    waiting={"interactive": 2, "batch": 1},
    thermal=HOT,
    pid=os.getpid(),
)
REPORT = ReplicaReport(
    "echo",
    os.getpid(),
    (ModelUsage("m", 0.0, 3, EngineLoad(running=3, waiting=4)),),
    (ProcessReport("r", 0, "", NodeMemory("here")),),
)


class FakeSource:
    def __init__(self) -> None:
        self.snapshot: SchedulerSnapshot | None = SNAPSHOT
        self.reports = [REPORT]
        self.asked = 0

    async def fetch_reports(self) -> list[ReplicaReport]:
        self.asked += 1
        return self.reports

    async def fetch_snapshot(self) -> SchedulerSnapshot | None:
        return self.snapshot


class Subject:
    """A monitor whose time goes on by ten seconds with each sample."""

    def __init__(self, **settings: Any) -> None:
        self.now = 1_000_000.0
        self.is_busy = True
        self.source = FakeSource()
        self.metrics = Metrics()
        self.monitor = ServerMonitor(
            Settings(**settings),
            self.source,
            self.metrics,
            "here",
            lambda: self.is_busy,
            history=History(),
            clock=lambda: self.now,
        )

    async def sample(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 10
            await self.monitor.sample()

    async def last(self, name: Any) -> dict[tuple[str, str], float]:
        """Return the last values of a chart's lines by label and model."""
        shown = await self.monitor.series(name, 3600.0, 600)
        return {
            (line.label, line.model): next(
                (value for value in reversed(line.mean) if value is not None), math.nan
            )
            for line in shown.lines
        }


async def test_sample_has_memory_requests_and_strain() -> None:
    subject = Subject()
    await subject.sample()
    assert await subject.last("memory") == {
        ("budget", ""): 1000,
        ("used", ""): 700,
        ("model", "m"): 400,
        ("job", "j"): 300,
    }
    assert await subject.last("requests") == {("running", ""): 3, ("waiting", ""): 7}
    assert await subject.last("thermal") == {
        ("state", ""): 2,
        ("heat", ""): 2,
        ("memory_pressure", ""): 0,
    }


async def test_tokens_and_first_tokens_are_those_since_the_last_sample() -> None:
    subject = Subject()
    subject.metrics.count_usage("m", Usage(500, 50, 0))
    await subject.sample()
    assert await subject.last("tokens") == {}
    subject.metrics.count_usage("m", Usage(100, 20, 0))
    subject.metrics.count_usage("n", Usage(100, 20, 0))
    subject.metrics.observe_first_token("m", 0.2)
    time.sleep(0.01)
    await subject.sample()
    rates = await subject.last("tokens")
    assert rates["prompt", ""] == pytest.approx(5 * rates["completion", ""], rel=1e-3)
    assert 0 < rates["completion", ""] < 40 / 0.01
    assert (await subject.last("first_token"))["p95", ""] == pytest.approx(0.2, rel=0.03)
    time.sleep(0.01)
    await subject.sample()
    assert (await subject.last("tokens"))["prompt", ""] == 0
    (p50, _) = (await subject.monitor.series("first_token", 3600.0, 600)).lines
    assert sum(value is not None for value in p50.mean) == 1


async def test_processes_use_cores() -> None:
    subject = Subject()
    await subject.sample()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    await subject.sample()
    found = await subject.last("cpu")
    assert set(found) == {("router", ""), ("scheduler", ""), ("echo", "")}
    assert 0 < found["router", ""] < 20


async def test_processes_that_may_be_on_another_machine_are_left_out() -> None:
    subject = Subject(max_replicas=2)
    elsewhere = ProcessReport("r", 0, "", NodeMemory("elsewhere"))
    subject.source.reports = [replace(REPORT, processes=(elsewhere,))]
    await subject.sample(2)
    assert set(await subject.last("cpu")) == {("router", "")}


async def test_what_does_not_answer_is_a_gap() -> None:
    subject = Subject()
    await subject.sample()
    subject.source.snapshot, subject.source.reports = None, []
    await subject.sample()
    shown = await subject.monitor.series("memory", 3600.0, 600)
    assert all(line.mean[-1] is None and line.mean[-2] is not None for line in shown.lines)
    with pytest.raises(Unavailable, match="does not answer"):
        await subject.monitor.thermal()


@pytest.mark.parametrize(
    ("range_s", "points", "step_s", "count"),
    [(3600.0, 600, 10, 360), (3600.0, 60, 60, 60), (86_400.0, 600, 144, 600), (3600.0, 1, 3600, 1)],
)
async def test_steps_hold_whole_samples_and_end_now(
    range_s: float, points: int, step_s: float, count: int
) -> None:
    subject = Subject()
    await subject.sample()
    shown = await subject.monitor.series("memory", range_s, points)
    assert shown.step_s == step_s
    assert all(len(line.mean) == len(line.min) == len(line.max) == count for line in shown.lines)
    assert shown.start % step_s == 0
    assert shown.start + step_s * count - step_s <= subject.now < shown.start + step_s * count
    assert shown.begun_at == 1_000_000.0


async def test_thermal_state_says_what_it_throttles_and_why() -> None:
    shown = await Subject(max_sequences=16).monitor.thermal()
    assert (shown.state, shown.reason) == ("serious", "the machine is hot (serious)")
    assert (shown.throttle.max_sequences, shown.throttle.usual_max_sequences) == (8, 16)
    assert shown.throttle.jobs_pause
    assert shown.throttle.prefers_small
    assert shown.sensor_problems == ("power: none",)


def test_ended_processes_are_forgotten() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        use = ProcessorUse()
        assert use.since_last({"a": process.pid}) == {}
        assert set(use.since_last({"a": process.pid})) == {"a"}
        process.communicate()
    assert use.since_last({"a": process.pid}) == {}
    assert use._known == {}


async def test_engines_are_asked_only_while_there_are_requests_or_other_models() -> None:
    subject = Subject()
    subject.is_busy = False
    await subject.sample(3)
    assert subject.source.asked == 1
    assert await subject.last("requests") == {("running", ""): 0, ("waiting", ""): 3}
    subject.is_busy = True
    await subject.sample()
    assert subject.source.asked == 2
    assert await subject.last("requests") == {("running", ""): 3, ("waiting", ""): 7}
    subject.is_busy = False
    used = replace(SNAPSHOT.residents[0], in_flight=1)
    subject.source.snapshot = replace(SNAPSHOT, residents=(used,))
    await subject.sample()
    assert subject.source.asked == 3
    other = LedgerEntry("n", 400, 0.0, format="echo")
    subject.source.snapshot = replace(SNAPSHOT, residents=(other,))
    await subject.sample(2)
    # It does not report the new model: it is asked again, and the load is not known.
    assert subject.source.asked == 5
    shown = await subject.monitor.series("requests", 3600.0, 600)
    assert all(line.mean[-2:] == (None, None) for line in shown.lines)
