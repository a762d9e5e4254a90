"""What the scheduler knows at one moment, for metrics and for the autoscaling policy."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.ledger import Ledger
from deployments.thermal import ThermalWatch


@dataclass(frozen=True, slots=True)
class ResidentView:
    """A model that holds memory; `idle_s` counts from its last request's end, 0 while it runs."""

    model_id: str
    format: str
    size_bytes: int
    in_flight: int
    idle_s: float
    is_kept: bool


@dataclass(frozen=True, slots=True)
class ThermalView:
    """The thermal state's name and number, and what throttling has cost."""

    state: str = "unknown"
    level: int = -1
    changes: int = 0
    throttled_s: float = 0.0
    admits: bool = True
    is_throttled: bool = False
    unloads_idle: bool = False


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """The ledger, the queue, the thermal state, and counts since the scheduler's start.

    `promised_bytes` are part of `used_bytes`.  `waiting` counts requests by their class.
    """

    budget_bytes: int = 0
    used_bytes: int = 0
    promised_bytes: int = 0
    residents: tuple[ResidentView, ...] = ()
    loading: tuple[str, ...] = ()
    waiting: Mapping[str, int] = field(default_factory=dict)
    loads: int = 0
    load_failures: int = 0
    evictions: int = 0
    thermal: ThermalView = field(default_factory=ThermalView)
    pid: int = 0


def take_snapshot(
    ledger: Ledger, thermal: ThermalWatch, now: float | None = None
) -> SchedulerSnapshot:
    """Return what is known at `now`, in monotonic seconds; asks nobody and never blocks."""
    now = time.monotonic() if now is None else now
    state = ledger.state
    formats = {one.model_id: one.format for one in ledger.residencies}
    waiting = Counter(request.priority for request in state.waiting)
    return SchedulerSnapshot(
        budget_bytes=state.budget_bytes,
        used_bytes=state.used_bytes,
        promised_bytes=sum(model.offer.needed_bytes for model in state.loading),
        residents=tuple(
            ResidentView(
                item.model_id,
                formats.get(item.model_id, ""),
                item.size_bytes,
                item.in_flight,
                0.0 if item.in_flight else max(now - max(item.used_at, item.granted_at), 0.0),
                item.is_pinned or item.keep_alive_s is not None,
            )
            for item in state.residents
        ),
        loading=tuple(model.model_id for model in state.loading),
        waiting={name: waiting[name] for name in ("interactive", "batch")},
        loads=ledger.tally.loads,
        load_failures=ledger.tally.load_failures,
        evictions=ledger.tally.evictions,
        thermal=_thermal(thermal),
        pid=os.getpid(),
    )


def _thermal(thermal: ThermalWatch) -> ThermalView:
    report, directive = thermal.report, thermal.directive
    return ThermalView(
        report.state.label,
        int(report.state),
        report.changes,
        report.throttled_s,
        directive.admits,
        directive.limits.decode_pause_s > 0,
        directive.unloads_idle,
    )
