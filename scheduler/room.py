"""Makes room for a waiting model: evicts idle models, shrinks its context or drains busy models."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from core.units import format_bytes
from scheduler.events import Drain, Load, Outcome, Unload
from scheduler.eviction import is_busy, is_held, victims
from scheduler.queue import WaitingGroup
from scheduler.state import HostState, LedgerEntry, LoadPlan, PendingLoad


def fitting_plans(state: HostState, plans: Sequence[LoadPlan], limit_bytes: int) -> list[LoadPlan]:
    """Return the plans that fit `limit_bytes` beside pinned models and what processes keep."""
    room = limit_bytes - state.pinned_bytes - state.kept_bytes
    return [plan for plan in plans if plan.needed_bytes <= room]


def ceiling_bytes(state: HostState, available_bytes: int | None) -> int | None:
    """Return what models may hold beside other applications; None if that is unknown.

    It does not depend on which models are loaded.  While one is being loaded or unloaded, its
    bytes are neither all held nor all free, so the last ceiling stays.
    """
    if available_bytes is None:
        return None
    if state.loading or state.closing_bytes:
        return state.ceiling_bytes
    return state.used_bytes + available_bytes


def candidates(state: HostState, waiting_since: float, now: float) -> list[LedgerEntry]:
    """Return the idle models that a request waiting since `waiting_since` may evict."""
    limits = state.limits
    return [
        item
        for item in state.residents
        if item.may_close
        and not is_busy(item, now, limits)
        and not is_held(item, waiting_since, now, limits)
    ]


def close(
    state: HostState, models: Iterable[LedgerEntry], reason: str, now: float, for_model: str = ""
) -> Outcome:
    """Unload the models: idle ones at once, the others after their last request."""
    chosen = list(models)
    actions = tuple(
        (Drain if is_busy(item, now, state.limits) else Unload)(item.model_id, reason, for_model)
        for item in chosen
    )
    return Outcome(
        state.with_residents([replace(item, is_closing=True) for item in chosen]), actions
    )


def admit(state: HostState, group: WaitingGroup, reserved: int, now: float) -> tuple[Outcome, int]:
    """Load a group's model or make room for it; also return the bytes to reserve for it.

    1. It fits, at once or after idle models are unloaded.
    2. After `patience_s`: the same with a reduced context.
    3. Then: busy models are drained.
    4. Else it waits; after `patience_s` its bytes are reserved.
    """
    plans = fitting_plans(state, group.plans, state.load_limit_bytes)
    idle = candidates(state, group.since, now)
    is_patient = now - group.since < state.limits.patience_s
    for plan in plans[:1] if is_patient else plans:  # (1) (2)
        found = _make_room(state, group.model_id, plan, reserved, idle, now)
        if found is not None:
            return found
    if is_patient:
        return Outcome(state), 0
    ripe = [
        item
        for item in state.residents
        if item.may_close and not is_held(item, group.since, now, state.limits)
    ]
    for plan in plans:  # (3)
        found = _make_room(state, group.model_id, plan, reserved, ripe, now)
        if found is not None:
            return found
    return Outcome(state), plans[0].needed_bytes if plans else 0  # (4)


def _make_room(
    state: HostState,
    model_id: str,
    plan: LoadPlan,
    reserved: int,
    candidates: Sequence[LedgerEntry],
    now: float,
) -> tuple[Outcome, int] | None:
    """Load if there is room, else evict `candidates`; None if that does not free enough."""
    missing = state.used_bytes + reserved + plan.needed_bytes - state.load_limit_bytes
    what = f"{model_id} needs {format_bytes(plan.needed_bytes)}"
    if missing <= 0:
        loading = (*state.loading, PendingLoad(model_id, plan))
        return Outcome(replace(state, loading=loading), (Load(model_id, plan, what),)), 0
    chosen = victims(missing - state.closing_bytes, candidates, now)
    if chosen is None:
        return None
    return close(state, chosen, what, now, model_id), plan.needed_bytes
