"""Takes snapshots of the scheduler's state for metrics and autoscaling."""

import os
import time
from collections import Counter

from deployments.messages import SchedulerSnapshot, ThermalView
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.thermal import ThermalWatch


def take_snapshot(
    ledger: Ledger, thermal: ThermalWatch, now: float | None = None, *, tasks: int = 0
) -> SchedulerSnapshot:
    """Return the state at `now`, in monotonic seconds; makes no calls and never blocks.

    `tasks` is the number of tasks of the scheduler's event loop.
    """
    now = time.monotonic() if now is None else now
    state = ledger.state
    waiting = Counter(request.priority for request in state.waiting)
    return SchedulerSnapshot(
        budget_bytes=state.budget_bytes,
        used_bytes=state.used_bytes,
        promised_bytes=sum(model.plan.needed_bytes for model in state.loading),
        residents=state.residents,
        loading=tuple(model.model_id for model in state.loading),
        waiting={name: waiting[name] for name in ("interactive", "batch")},
        loads=ledger.counts.loads,
        load_failures=ledger.counts.load_failures,
        evictions=ledger.counts.evictions,
        thermal=_thermal(thermal),
        pid=os.getpid(),
        tasks=tasks,
        taken_at=now,
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
