"""Collects metrics of the replicas and the scheduler for the router's `/metrics`."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from core.errors import ImpetusError
from core.supervision import PartView
from deployments.messages import ModelUsage, ReplicaReport, SchedulerSnapshot
from deployments.metrics import families
from deployments.serve.handles import Handle, call, direct
from deployments.serve.status import running_deployments

logger = logging.getLogger(__name__)

_LIMIT_S = 2.0

_GAUGES: Mapping[str, tuple[str, Callable[[ModelUsage], float]]] = {
    "impetus_engine_running_sequences": (
        "Sequences being generated.",
        lambda report: report.load.running,
    ),
    "impetus_engine_waiting_requests": (
        "Requests waiting for a slot.",
        lambda report: report.load.waiting,
    ),
    "impetus_engine_kv_used_tokens": (
        "Tokens in KV cells, retained prefixes included.",
        lambda report: report.load.kv_used_tokens,
    ),
    "impetus_engine_kv_tokens": ("KV cells.", lambda report: report.load.kv_tokens),
    "impetus_model_measured_bytes": (
        "Bytes that a model holds by the measurement of its process; 0 if not measured.",
        lambda report: report.measured_bytes,
    ),
}
_COUNTERS: Mapping[str, tuple[str, Callable[[ModelUsage], float]]] = {
    "impetus_engine_steps": ("Forward passes.", lambda report: report.load.steps),
    "impetus_engine_preemptions": (
        "Sequences that gave their KV cells back and were computed again.",
        lambda report: report.load.preemptions,
    ),
    "impetus_engine_native_cpu_seconds": (
        "CPU seconds of the engine's own thread inside the runtime.",
        lambda report: report.load.native_cpu_s,
    ),
}


class ReplicaTelemetry:
    """Implements `router.services.Telemetry`: a Prometheus collector of the last fetched reports.

    Only running formats that hold models are asked: a call would start a format scaled to zero.
    """

    def __init__(
        self,
        formats: Mapping[str, Handle],
        resident_formats: Callable[[], frozenset[str]],
        scheduler: Handle,
        running: Callable[[], Awaitable[frozenset[str]]] = running_deployments,
        own_parts: Callable[[], Sequence[PartView]] = tuple,
    ) -> None:
        """`own_parts` returns the background tasks of this process."""
        self._own_parts = own_parts
        self._formats = formats
        self._resident_formats = resident_formats
        self._scheduler = direct(scheduler)
        self._running = running
        self._reports: list[ReplicaReport] = []
        self._snapshot: SchedulerSnapshot | None = None
        self._tasks = 0

    async def refresh(self) -> None:
        """Ask the scheduler and every format that holds a model, concurrently.

        Those that do not answer within 2 s are left out, Serve's controller included.
        """
        self._tasks = len(asyncio.all_tasks())
        self._snapshot, self._reports = await asyncio.gather(
            self.fetch_snapshot(), self.fetch_reports()
        )

    async def fetch_snapshot(self) -> SchedulerSnapshot | None:
        """Return the scheduler's state now; None if it does not answer within 2 s."""
        try:
            async with asyncio.timeout(_LIMIT_S):
                snapshot: SchedulerSnapshot = await call(self._scheduler.snapshot.remote())
        except (TimeoutError, ImpetusError) as problem:
            logger.warning("no metrics from the scheduler: %r", problem)
            return None
        return snapshot

    async def fetch_reports(self) -> list[ReplicaReport]:
        """Return the reports of the formats that hold models and answer within 2 s."""
        if not self._resident_formats():
            return []
        try:
            async with asyncio.timeout(_LIMIT_S):
                running = await self._running()
        except Exception as problem:
            logger.warning("cannot ask Serve which formats run: %r", problem)
            return []
        names = sorted(self._resident_formats() & running)
        reports = await asyncio.gather(*(self._report(name) for name in names))
        return [report for report in reports if report is not None]

    async def _report(self, name: str) -> ReplicaReport | None:
        try:
            async with asyncio.timeout(_LIMIT_S):
                report: ReplicaReport = await call(self._formats[name].report.remote())
        except (TimeoutError, ImpetusError) as problem:
            logger.warning("no metrics from %s: %r", name, problem)
            return None
        return report

    def _processes(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, process id and number of tasks of each part that answered."""
        yield "router", os.getpid(), self._tasks
        for report in self._reports:
            yield report.format, report.pid, report.tasks
        if self._snapshot is not None:
            yield "scheduler", self._snapshot.pid, self._snapshot.tasks

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        pids = GaugeMetricFamily(
            "impetus_process_pid", "Process id of a part of the server.", labels=["process"]
        )
        tasks = GaugeMetricFamily(
            "impetus_process_tasks",
            "Tasks of the event loop of a part of the server.",
            labels=["process"],
        )
        for process, pid, count in self._processes():
            pids.add_metric([process], pid)
            tasks.add_metric([process], count)
        yield pids
        yield tasks
        is_up = self._snapshot is not None
        yield GaugeMetricFamily(
            "impetus_scheduler_up", "Whether the scheduler answered in time.", value=float(is_up)
        )
        yield from self._part_families()
        if self._snapshot is not None:
            yield from families(self._snapshot)
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (help_text, read) in table.items():
                family = kind(name, help_text, labels=["model"])
                for report in self._reports:
                    for resident in report.residents:
                        family.add_metric([resident.model_id], read(resident))
                yield family

    def _part_families(self) -> Iterator[Metric]:
        """Yield which background tasks run, and how often each failed."""
        labels = ["process", "part"]
        is_up = GaugeMetricFamily(
            "impetus_part_up", "Whether a background task of a process runs.", labels=labels
        )
        failures = CounterMetricFamily(
            "impetus_part_failures",
            "Failures of a background task, which was then restarted or tried again.",
            labels=labels,
        )
        theirs = () if self._snapshot is None else self._snapshot.parts
        for process, parts in (("router", self._own_parts()), ("scheduler", theirs)):
            for part in _by_name(parts):
                is_up.add_metric([process, part.name], float(part.status == "running"))
                failures.add_metric([process, part.name], part.failures)
        yield is_up
        yield failures


def _by_name(parts: Sequence[PartView]) -> Iterator[PartView]:
    """Yield one view for each name; of several parts with one name the worst state is shown."""
    merged: dict[str, PartView] = {}
    for part in parts:
        known = merged.get(part.name)
        if known is not None:
            status = part.status if known.status == "running" else known.status
            part = replace(part, status=status, failures=part.failures + known.failures)
        merged[part.name] = part
    yield from merged.values()
