"""Samples what charts show every ten seconds, and tells it and the thermal state."""

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import psutil
from prometheus_client import Counter

from backends.base import EngineLoad
from core.errors import Unavailable
from core.metrics import Metrics
from core.settings import Settings
from core.supervision import Supervisor, attempt
from deployments.messages import ReplicaReport, SchedulerSnapshot
from router.monitor.chart_service import (
    UNITS,
    SeriesAnswer,
    SeriesLine,
    ThermalAnswer,
    ThrottleView,
)
from router.monitor.history import History, LineName, SeriesName

_STATES: Mapping[str, int] = {"unknown": -1, "nominal": 0, "fair": 1, "serious": 2, "critical": 3}


class Source(Protocol):
    """Reports of other processes, which come within seconds; see `deployments.router.telemetry`."""

    async def fetch_snapshot(self) -> SchedulerSnapshot | None:
        """Return the scheduler's state; None if it does not answer."""
        ...

    async def fetch_reports(self) -> list[ReplicaReport]:
        """Return the reports of the formats that hold models and answer."""
        ...


class ServerMonitor:
    """Implements `router.monitor.chart_service.Monitor` for this process; used from its loop.

    Tokens, times to first tokens and the router's CPU are those of this process alone.  Nothing
    is kept over its end.
    """

    def __init__(
        self,
        settings: Settings,
        source: Source,
        metrics: Metrics,
        node_id: str,
        is_busy: Callable[[], bool],
        *,
        history: History | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`is_busy` tells whether this process answers requests now."""
        self._is_busy = is_busy
        self._settings = settings
        self._source = source
        self._metrics = metrics
        self._node_id = node_id
        self._history = history or History()
        self._clock = clock
        self._begun_at = clock()
        self._processor = ProcessorUse()
        self._tokens: dict[str, float] = {}
        self._counted_at = math.nan
        # The engines' reports cost the most; without requests they say nothing new.
        self._reports: list[ReplicaReport] = []
        self._reported: frozenset[str] = frozenset()
        # One chart at a time: computing them shares the interpreter with the streamed answers.
        self._turn = asyncio.Lock()

    def run(self, supervisor: Supervisor) -> None:
        """Begin to sample."""
        supervisor.keep_running("samples of charts", self._keep_sampling)

    async def _keep_sampling(self) -> None:
        while True:
            await attempt(self.sample, is_vital=False)
            await asyncio.sleep(self._history.sample_s)

    async def sample(self) -> None:
        """Take one sample; what did not answer is missing in it."""
        snapshot = await self._source.fetch_snapshot()
        loads = await self._loads(snapshot)
        waits = self._metrics.take_first_tokens()
        self._history.record(self._clock(), dict(self._values(snapshot, loads)), waits)

    async def _loads(self, snapshot: SchedulerSnapshot | None) -> list[EngineLoad] | None:
        """Return the loads of busy engines, none while there are no requests; None: not known."""
        if snapshot is None:
            return None
        models = frozenset(one.model_id for one in snapshot.residents if not one.is_job)
        is_used = self._is_busy() or any(one.in_flight for one in snapshot.residents)
        if models == self._reported and not is_used:
            return []
        self._reports = await self._source.fetch_reports()
        loads = {
            resident.model_id: resident.load
            for report in self._reports
            for resident in report.residents
        }
        # One that did not answer is asked again.
        self._reported = models & loads.keys()
        return list(loads.values()) if models <= loads.keys() else None

    def _values(
        self, snapshot: SchedulerSnapshot | None, loads: list[EngineLoad] | None
    ) -> Iterator[tuple[LineName, float]]:
        yield from self._token_rates()
        pids = dict(self._local_processes(snapshot))
        for process, cores in self._processor.since_last(pids).items():
            yield LineName("cpu", process), cores
        if snapshot is None:
            return
        yield LineName("memory", "budget"), snapshot.budget_bytes
        yield LineName("memory", "used"), snapshot.used_bytes
        for one in snapshot.residents:
            kind = "job" if one.is_job else "model"
            yield LineName("memory", kind, one.model_id), one.size_bytes
        if loads is not None:
            waiting = sum(load.waiting for load in loads) + sum(snapshot.waiting.values())
            yield LineName("requests", "running"), sum(load.running for load in loads)
            yield LineName("requests", "waiting"), waiting
        thermal = snapshot.thermal
        yield LineName("thermal", "state"), thermal.level
        yield LineName("thermal", "heat"), _STATES.get(thermal.heat, -1)
        yield LineName("thermal", "memory_pressure"), _STATES.get(thermal.memory_pressure, -1)

    def _token_rates(self) -> Iterator[tuple[LineName, float]]:
        """Yield tokens a second of answers that ended since the last sample."""
        now, before = time.monotonic(), self._counted_at
        self._counted_at = now
        for label, counter in (
            ("prompt", self._metrics.prompt_tokens),
            ("completion", self._metrics.completion_tokens),
        ):
            total = _total(counter)
            added = total - self._tokens.get(label, 0.0)
            self._tokens[label] = total
            if now > before:
                yield LineName("tokens", label), added / (now - before)

    def _local_processes(self, snapshot: SchedulerSnapshot | None) -> Iterator[tuple[str, int]]:
        """Yield name and id of the processes that are known to run on this machine."""
        yield "router", os.getpid()
        if snapshot is not None and self._settings.max_replicas == 1:
            yield "scheduler", snapshot.pid
        for report in self._reports:
            if all(one.node.node_id in ("", self._node_id) for one in report.processes):
                yield report.format, report.pid

    async def series(self, name: SeriesName, range_s: float, points: int) -> SeriesAnswer:
        """Return a chart, computed on a thread; its steps begin at whole multiples of one."""
        history = self._history
        step_s = max(math.ceil(range_s / points), math.ceil(history.sample_s))
        count = math.ceil(range_s / step_s)
        start = (math.floor(self._clock() / step_s) + 1 - count) * step_s
        async with self._turn:
            lines = await asyncio.to_thread(history.lines, name, start, step_s, count)
        return SeriesAnswer(
            name=name,
            unit=UNITS[name],
            start=start,
            step_s=step_s,
            sample_s=history.sample_s,
            begun_at=self._begun_at,
            lines=tuple(
                SeriesLine(
                    label=line.name.label,
                    model=line.name.model,
                    min=tuple(line.least),
                    mean=tuple(line.mean),
                    max=tuple(line.most),
                )
                for line in lines
            ),
        )

    async def thermal(self) -> ThermalAnswer:
        """Return the thermal state of this moment."""
        snapshot = await self._source.fetch_snapshot()
        if snapshot is None:
            raise Unavailable("The scheduler does not answer; try again.", retry_after_s=5)
        one = snapshot.thermal
        return ThermalAnswer(
            state=one.state,
            reason=one.reason,
            heat=one.heat,
            memory_pressure=one.memory_pressure,
            is_low_power=one.is_low_power,
            battery=one.battery,
            throttle=ThrottleView(
                is_throttled=one.is_throttled,
                admits_requests=one.admits,
                max_sequences=one.max_sequences,
                usual_max_sequences=self._settings.max_sequences,
                prefill_chunk_tokens=one.prefill_chunk_tokens,
                usual_prefill_chunk_tokens=self._settings.prefill_chunk_tokens,
                decode_pause_s=one.decode_pause_s,
                jobs_pause=one.pauses_jobs,
                prefers_small=one.keeps_cool,
                unloads_idle=one.unloads_idle,
            ),
            changes=one.changes,
            throttled_s=one.throttled_s,
            sensor_problems=one.sensor_problems,
        )


class ProcessorUse:
    """Processor time that processes used from one call to the next."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[psutil.Process, float, float]] = {}

    def since_last(self, pids: Mapping[str, int]) -> dict[str, float]:
        """Return by name how many cores each process used; without those seen the first time."""
        found: dict[str, float] = {}
        known: dict[int, tuple[psutil.Process, float, float]] = {}
        for name, pid in pids.items():
            before = self._known.get(pid)
            try:
                process = psutil.Process(pid) if before is None else before[0]
                times = process.cpu_times()
                is_same = before is None or process.is_running()
            except psutil.Error:
                continue
            if not is_same:
                # Another process has its id now; the next call finds it new.
                continue
            used, now = times.user + times.system, time.monotonic()
            known[pid] = (process, used, now)
            if before is not None and now > before[2]:
                found[name] = (used - before[1]) / (now - before[2])
        self._known = known
        return found


def _total(counter: Counter) -> float:
    """Return the sum over all labels."""
    return sum(
        sample.value
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )
