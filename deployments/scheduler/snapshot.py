"""Takes snapshots of the scheduler's state for metrics, autoscaling and the event stream."""

import os
import time
from collections import Counter

from core.units import MIB
from deployments.messages import MachineState, MemoryUse, SchedulerSnapshot, ThermalView
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.thermal import ThermalWatch

_STEP_BYTES = 64 * MIB


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


def machine_state(ledger: Ledger, thermal: ThermalWatch, decision_number: int) -> MachineState:
    """Return the ledger and the strain without what changes all the time; never blocks."""
    state, report, directive = ledger.state, thermal.report, thermal.directive
    reading = report.reading
    held = tuple(
        MemoryUse(
            one.model_id,
            "job" if one.is_job else "unloading" if one.is_closing else "model",
            one.size_bytes,
            one.is_pinned,
        )
        for one in state.residents
    )
    loading = tuple(
        MemoryUse(one.model_id, "loading", one.plan.needed_bytes) for one in state.loading
    )
    return MachineState(
        budget_bytes=state.budget_bytes,
        used_bytes=state.used_bytes,
        # Other applications' memory changes by a few MB at every poll.
        limit_bytes=state.load_limit_bytes // _STEP_BYTES * _STEP_BYTES,
        kept_bytes=state.kept_bytes,
        uses=(*held, *loading),
        thermal=report.state.label,
        heat=reading.thermal.label,
        memory_pressure=reading.memory.label,
        is_low_power=reading.is_low_power,
        battery=None if reading.battery is None else round(reading.battery, 2),
        is_throttled=directive.limits.decode_pause_s > 0,
        admits=directive.admits,
        strain=thermal.strain,
        decision_number=decision_number,
    )


def _thermal(thermal: ThermalWatch) -> ThermalView:
    report, directive = thermal.report, thermal.directive
    reading, limits = report.reading, directive.limits
    return ThermalView(
        report.state.label,
        int(report.state),
        report.changes,
        report.throttled_s,
        directive.admits,
        limits.decode_pause_s > 0,
        directive.unloads_idle,
        directive.pauses_jobs,
        directive.keeps_cool,
        limits.max_sequences,
        limits.prefill_chunk_tokens,
        limits.decode_pause_s,
        thermal.strain,
        reading.thermal.label,
        reading.memory.label,
        reading.is_low_power,
        reading.battery,
        tuple(f"{one.sensor}: {one.message}" for one in reading.problems),
    )
