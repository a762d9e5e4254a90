"""Periodically publishes the scheduler's state to Serve's autoscaler and Ray's metrics."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from backends.base import Backend
from core.supervision import attempt, call_in_thread
from deployments.messages import SchedulerSnapshot
from deployments.scheduler.ray_mirror import RayMirror
from deployments.serve.autoscaling import write_directive
from scheduler.scaling import FormatUse, ScalingDirective, finished

PUBLISH_S = 2.0
# How often idle models' replicas are asked, so that a process in use is not stopped.
_REFRESH_S = 60.0


class Publisher:
    """Turns snapshots into the directive of the autoscaling policy, and mirrors them for Ray."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        snapshot: Callable[[], SchedulerSnapshot],
        refresh: Callable[[], Awaitable[None]],
        idle_s: float,
        *,
        write: Callable[[ScalingDirective], None] = write_directive,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backends = backends
        self._on_demand = [name for name, one in backends.items() if one.starts_on_demand]
        self._snapshot = snapshot
        self._refresh = refresh
        self._idle_s = idle_s
        self._write = write
        self._clock = clock
        self._mirror = RayMirror()
        self._last_used_at = dict.fromkeys(backends, clock())
        self._refreshed_at = clock()
        self._written: ScalingDirective | None = None

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            await attempt(self.publish)
            await asyncio.sleep(PUBLISH_S)

    async def publish(self) -> None:
        """Publish once; writes the directive only if it changed."""
        snapshot = self._snapshot()
        if self._is_refresh_due(snapshot):
            self._refreshed_at = self._clock()
            await self._refresh()
            snapshot = self._snapshot()
        directive = self.directive(snapshot)
        if directive != self._written:
            await call_in_thread("impetus-directive", lambda: self._write(directive))
            self._written = directive
        self._mirror.show(snapshot)

    def _is_refresh_due(self, snapshot: SchedulerSnapshot) -> bool:
        is_held = any(item.format in self._on_demand for item in snapshot.residents)
        return is_held and self._clock() - self._refreshed_at >= min(_REFRESH_S, self._idle_s / 4)

    def directive(self, snapshot: SchedulerSnapshot) -> ScalingDirective:
        """Return the scaling directive for a snapshot."""
        free = snapshot.budget_bytes - snapshot.used_bytes
        thermal = snapshot.thermal
        growing = [
            name
            for name, backend in self._backends.items()
            if not thermal.is_throttled and backend.process_bytes <= free
        ]
        ended = finished(self._uses(snapshot), self._idle_s, unloads_idle=thermal.unloads_idle)
        return ScalingDirective(thermal.admits, tuple(sorted(growing)), tuple(ended))

    def _uses(self, snapshot: SchedulerSnapshot) -> dict[str, FormatUse]:
        now = self._clock()
        uses = {}
        for name in self._on_demand:
            held = [item for item in snapshot.residents if item.format == name]
            idle_s = min((item.idle_s(snapshot.taken_at) for item in held), default=None)
            if idle_s is not None:
                self._last_used_at[name] = max(self._last_used_at[name], now - idle_s)
            uses[name] = FormatUse(
                now - self._last_used_at[name],
                is_kept=any(item.has_keep_rule for item in held),
                # A load of any format counts: loads take only seconds.
                is_busy=any(item.in_flight for item in held) or bool(snapshot.loading),
            )
        return uses
