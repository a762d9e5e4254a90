"""What the server's processes report of themselves to /metrics."""

import os
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deployments.orders import Receipt


class ProcessBook:
    """Process ids and the runtimes' own CPU seconds, from the replicas' receipts.

    A prometheus collector; used on the router's event loop only.
    """

    def __init__(self) -> None:
        self._pids: dict[str, int] = {"router": os.getpid()}
        self._native_cpu_s: dict[str, float] = {}

    def note(self, receipt: Receipt) -> None:
        """Remember what a replica said with its last result."""
        self._pids[receipt.process] = receipt.pid
        self._native_cpu_s[receipt.model_id] = receipt.native_cpu_s

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        pids = GaugeMetricFamily(
            "impetus_process_pid", "Process id of a part of the server.", labels=["process"]
        )
        for process, pid in self._pids.items():
            pids.add_metric([process], pid)
        yield pids
        native = CounterMetricFamily(
            "impetus_engine_native_cpu_seconds",
            "CPU seconds of the engine's thread inside the runtime.",
            labels=["model"],
        )
        for model_id, seconds in self._native_cpu_s.items():
            native.add_metric([model_id], seconds)
        yield native
