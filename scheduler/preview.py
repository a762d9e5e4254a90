"""Tells what a load would do at the moment: whether it fits, and whom it would evict; pure."""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from scheduler.events import BudgetChanged, Drain, Load, Outcome, Reject, Unload
from scheduler.policy import decide
from scheduler.state import HostState, LoadPlan, Waiting

# `now`: memory is free.  `after_unloading`: idle models make room.  `after_requests`: models make
# room that answer requests, or jobs and unloads have to end.  `no`: it does not fit.
MemoryFit: TypeAlias = Literal["now", "after_unloading", "after_requests", "no"]


@dataclass(frozen=True, slots=True)
class LoadPreview:
    """What a load would do; `plan` is None, and `reason` tells why, if it does not fit.

    `evicted` are the models that would be unloaded for it.
    """

    fit: MemoryFit
    plan: LoadPlan | None = None
    evicted: tuple[str, ...] = ()
    reason: str = ""


def preview(
    state: HostState, model_id: str, plans: tuple[LoadPlan, ...], now: float
) -> LoadPreview:
    """Return what a load of the model by one of `plans` would do, and change nothing.

    If it is in memory, that memory counts as free.  Other requests that wait do not count; the
    load is one that has waited as long as it takes to evict models in use.
    """
    # As if it had waited for long, and had begun: strain and patience delay a load only.
    waiting = Waiting(0, model_id, plans, -math.inf, math.inf, is_resumed=True)
    state = replace(
        state,
        residents=tuple(one for one in state.residents if one.model_id != model_id),
        loading=tuple(one for one in state.loading if one.model_id != model_id),
        waiting=(waiting,),
    )
    outcome = _decide(state, now)
    rejects = [one for one in outcome.actions if isinstance(one, Reject)]
    if rejects:
        return LoadPreview("no", reason=rejects[0].reason)
    evictions = [
        one
        for one in outcome.actions
        if isinstance(one, Unload | Drain) and one.for_model == model_id
    ]
    fit: MemoryFit = "after_unloading" if evictions else "now"
    if any(isinstance(one, Drain) for one in evictions) or not (evictions or _load(outcome)):
        fit = "after_requests"
    # When all that closes, and each job, has ended.
    left = tuple(one for one in outcome.state.residents if not (one.is_closing or one.is_job))
    later = _decide(replace(outcome.state, residents=left, loading=()), now)
    load = _load(outcome) or _load(later)
    plan = None if load is None else load.plan
    return LoadPreview(fit, plan, tuple(one.model_id for one in evictions))


def _decide(state: HostState, now: float) -> Outcome:
    """Let the policy look at its waiting requests."""
    return decide(state, BudgetChanged(state.budget_bytes), now)


def _load(outcome: Outcome) -> Load | None:
    return next((one for one in outcome.actions if isinstance(one, Load)), None)
