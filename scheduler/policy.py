"""Scheduling policy: decides loads, evictions and grants after each event (no clock, no I/O)."""

import math
from dataclasses import replace

from core.units import format_bytes
from scheduler.events import (
    AvailableChanged,
    BudgetChanged,
    Configured,
    Event,
    Grant,
    Left,
    Loaded,
    LoadFailed,
    Outcome,
    ProcessEnded,
    Reject,
    Replaced,
    StrainChanged,
    Tick,
    Unloaded,
    UnloadWanted,
    Used,
    Wanted,
)
from scheduler.eviction import expired, victims
from scheduler.queue import groups, is_full, overdue, retry_after_s
from scheduler.room import admit, candidates, ceiling_bytes, close, fitting_plans
from scheduler.state import HostState, LedgerEntry, Waiting


def decide(state: HostState, event: Event, now: float) -> Outcome:
    """Return the state after `event` and the actions; `now` is in monotonic seconds.

    Every `Wanted` ends with exactly one `Grant`, `Reject` or `Left`.  Used bytes exceed the budget
    only after a measurement or the budget itself changed.
    """
    outcome = _apply(state, event, now)
    # The models' usage is fresh only after these events.
    if isinstance(event, Tick | StrainChanged):
        outcome = outcome.then(_unload_expired(outcome.state, now))
        outcome = outcome.then(_unload_under_strain(outcome.state, now))
    for step in (_reject_hopeless, _return_to_budget, _load_waiting):
        outcome = outcome.then(step(outcome.state, now))
    return outcome


def _apply(state: HostState, event: Event, now: float) -> Outcome:
    match event:
        case Wanted():
            return _grant_or_queue(state, event, now)
        case Left(request_id):
            left = tuple(item for item in state.waiting if item.request_id != request_id)
            return Outcome(replace(state, waiting=left))
        case Loaded():
            return _finish_load(state, event, now)
        case LoadFailed():
            return _fail_load(state, event)
        case UnloadWanted(model_id, reason):
            resident = state.resident(model_id)
            if resident is None or resident.is_closing:
                return Outcome(state)
            return close(state, [resident], reason, now)
        case _:
            return Outcome(_update(state, event))


def _update(state: HostState, event: Event) -> HostState:
    """Apply an event that needs no action by itself."""
    match event:
        case Unloaded(model_id, kept):
            left = tuple(item for item in state.residents if item.model_id != model_id)
            return _with_kept(replace(state, residents=left), kept)
        case Replaced(model_id, old_id):
            return replace(
                state,
                residents=tuple(
                    replace(item, model_id=old_id, is_closing=True)
                    if item.model_id == model_id
                    else item
                    for item in state.residents
                ),
            )
        case ProcessEnded(process):
            return replace(state, kept=tuple(pair for pair in state.kept if pair[0] != process))
        case StrainChanged(is_critical):
            return replace(state, is_critical=is_critical)
        case Used(usages, asked_at, kept):
            state = _with_kept(state, kept)
            by_id = {usage.model_id: usage for usage in usages}
            return replace(
                state,
                residents=tuple(
                    replace(
                        item,
                        in_flight=usage.in_flight,
                        # Err early: too late could evict a model in use.
                        used_at=max(item.used_at, asked_at - usage.idle_s),
                        size_bytes=usage.measured_bytes or item.size_bytes,
                    )
                    if (usage := by_id.get(item.model_id))
                    else item
                    for item in state.residents
                ),
            )
        case Configured(model_id, settings):
            others = tuple(pair for pair in state.settings if pair[0] != model_id)
            state = replace(state, settings=(*others, (model_id, settings)))
            resident = state.resident(model_id)
            return (
                state if resident is None else state.with_residents([_configured(state, resident)])
            )
        case BudgetChanged(budget_bytes):
            return replace(state, budget_bytes=budget_bytes)
        case AvailableChanged(available_bytes):
            return replace(state, ceiling_bytes=ceiling_bytes(state, available_bytes))
        case _:
            assert isinstance(event, Tick)
            return state


def _with_kept(state: HostState, kept: tuple[tuple[str, int], ...]) -> HostState:
    """Record what these processes hold beside their models; other processes stay unchanged."""
    known = dict(state.kept) | dict(kept)
    return replace(state, kept=tuple(pair for pair in known.items() if pair[1] > 0))


def _configured(state: HostState, resident: LedgerEntry) -> LedgerEntry:
    settings = state.settings_of(resident.model_id)
    return replace(resident, is_pinned=settings.is_pinned, keep_alive_s=settings.keep_alive_s)


def _grant_or_queue(state: HostState, event: Wanted, now: float) -> Outcome:
    resident = state.resident(event.model_id)
    if resident is not None and not resident.is_closing:
        state = state.with_residents([replace(resident, granted_at=now)])
        return Outcome(state, (Grant(event.request_id, event.model_id, "it is resident"),))
    if is_full(state, event.model_id):
        bound = state.limits.waiting_per_model
        reason = f"{bound} requests already wait for {event.model_id}. Try again later."
        retry = retry_after_s(state)
        return Outcome(state, (Reject(event.request_id, event.model_id, "full", reason, retry),))
    request = Waiting(
        event.request_id,
        event.model_id,
        event.plans,
        now,
        event.deadline,
        event.priority,
        event.is_resumed,
    )
    return Outcome(replace(state, waiting=(*state.waiting, request)))


def _finish_load(state: HostState, event: Loaded, now: float) -> Outcome:
    """Make a model resident and grant all requests that wait for it."""
    granted = [item for item in state.waiting if item.model_id == event.model_id]
    resident = LedgerEntry(
        event.model_id,
        event.size_bytes,
        used_at=now,
        load_s=event.load_s,
        granted_at=now if granted else -math.inf,
        format=event.format,
        is_job=event.is_job,
    )
    others = tuple(item for item in state.residents if item.model_id != event.model_id)
    state = replace(
        state,
        residents=(*others, _configured(state, resident)),
        loading=tuple(item for item in state.loading if item.model_id != event.model_id),
        waiting=tuple(item for item in state.waiting if item.model_id != event.model_id),
    )
    reason = f"it was loaded in {event.load_s:.2f} s"
    grants = tuple(Grant(item.request_id, item.model_id, reason) for item in granted)
    return Outcome(state, grants)


def _fail_load(state: HostState, event: LoadFailed) -> Outcome:
    """Reject the requests that wait for the model, unless a smaller plan is left."""
    tried = next((item.plan for item in state.loading if item.model_id == event.model_id), None)
    waiting: list[Waiting] = []
    rejects: list[Reject] = []
    for item in state.waiting:
        if item.model_id != event.model_id:
            waiting.append(item)
            continue
        limit = tried.needed_bytes if tried and event.is_memory else 0
        smaller = tuple(plan for plan in item.plans if plan.needed_bytes < limit)
        if smaller:
            waiting.append(replace(item, plans=smaller))
        else:
            rejects.append(Reject(item.request_id, item.model_id, "failed", event.message))
    loading = tuple(item for item in state.loading if item.model_id != event.model_id)
    return Outcome(replace(state, loading=loading, waiting=tuple(waiting)), tuple(rejects))


def _reject_hopeless(state: HostState, now: float) -> Outcome:
    """Reject requests that waited too long or can never fit."""
    retry = retry_after_s(state)
    rejects: list[Reject] = []
    late = {item.request_id for item in overdue(state.waiting, now)}
    for item in state.waiting:
        if item.request_id in late:
            waited = f"{item.model_id} waited {now - item.since:.0f} s"
            reason = (
                f"{waited} for the machine to recover from heat, low power or memory pressure. "
                "Try again later."
                if state.is_critical
                else f"{waited} for memory that did not become free: {_usage(state)}. "
                "Try again later."
            )
            rejects.append(Reject(item.request_id, item.model_id, "timeout", reason, retry))
        elif not state.is_loading(item.model_id):
            rejects += _reject_too_large(state, item, now)
    ended = {reject.request_id for reject in rejects}
    waiting = tuple(item for item in state.waiting if item.request_id not in ended)
    return Outcome(replace(state, waiting=waiting), tuple(rejects))


def _reject_too_large(state: HostState, item: Waiting, now: float) -> list[Reject]:
    """Reject a request whose model fits no budget, or for too long not beside other programs.

    Batch requests and jobs wait for other programs until their deadline.
    """
    least = min((plan.needed_bytes for plan in item.plans), default=0)
    needs = f"{item.model_id} needs {format_bytes(least)}; {_usage(state)}"
    if not fitting_plans(state, item.plans, state.budget_bytes):
        reason = (
            f"{needs}, {format_bytes(state.pinned_bytes)} of it by pinned models{_kept(state)}. "
            "Choose a smaller model, unpin models or raise memory_budget."
        )
        return [Reject(item.request_id, item.model_id, "memory", reason)]
    is_patient = item.priority == "batch" or now - item.since < state.limits.ceiling_wait_s
    if is_patient or fitting_plans(state, item.plans, state.load_limit_bytes):
        return []
    reason = (
        f"{needs}. Close other applications, choose a smaller model, or set memory_budget to "
        "ignore what they use."
    )
    retry = retry_after_s(state)
    return [Reject(item.request_id, item.model_id, "memory", reason, retry)]


def _usage(state: HostState) -> str:
    usage = (
        f"of the {format_bytes(state.budget_bytes)} for all models, "
        f"{format_bytes(state.used_bytes)} is in use"
    )
    if state.load_limit_bytes == state.budget_bytes:
        return usage
    return f"{usage}, and other applications leave {format_bytes(state.load_limit_bytes)} of it"


def _kept(state: HostState) -> str:
    if not state.kept_bytes:
        return ""
    return f" and {format_bytes(state.kept_bytes)} by processes that did not release it"


def _unload_under_strain(state: HostState, now: float) -> Outcome:
    """Under critical strain, unload idle models that are not pinned."""
    if not state.is_critical:
        return Outcome(state)
    reason = "the machine is under critical strain and it is idle"
    return close(state, candidates(state, now, now), reason, now)


def _unload_expired(state: HostState, now: float) -> Outcome:
    outcome = Outcome(state)
    for resident in expired(state.residents, now, state.limits):
        reason = f"it was idle for {now - resident.used_at:.0f} s, its keep-alive"
        outcome = outcome.then(close(outcome.state, [resident], reason, now))
    return outcome


def _return_to_budget(state: HostState, now: float) -> Outcome:
    """Unload idle models while used bytes exceed the budget."""
    over = state.used_bytes - state.closing_bytes - state.budget_bytes
    if over <= 0:
        return Outcome(state)
    idle = candidates(state, now, now)
    # Free what can be freed, even if that is not enough.
    chosen = victims(over, idle, now)
    reason = f"{_usage(state)}"
    return close(state, idle if chosen is None else chosen, reason, now)


def _load_waiting(state: HostState, now: float) -> Outcome:
    """Start the loads that fit, and make room for the others."""
    outcome = Outcome(state)
    reserved = 0
    for group in groups(state):
        busy = outcome.state.resident(group.model_id) is not None
        if busy or outcome.state.is_loading(group.model_id):
            continue
        # Under critical strain only answers that have begun justify a load.
        if state.is_critical and not group.is_resumed:
            continue
        step, promised = admit(outcome.state, group, reserved, now)
        outcome = outcome.then(step)
        reserved += promised
    return outcome
