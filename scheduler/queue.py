"""Who waits, in which order, and for how long yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.state import HostState, LoadPlan, Waiting


@dataclass(frozen=True, slots=True)
class WaitingGroup:
    """All requests that wait for one model.

    `since` is when the oldest came; `rank` orders groups, the smallest first.  `is_resumed`: an
    answer that has begun is among them.
    """

    model_id: str
    plans: tuple[LoadPlan, ...]
    since: float
    rank: float
    is_resumed: bool = False


def rank(request: Waiting, batch_delay_s: float) -> float:
    """Return the request's place: its arrival, a batch request's put off.

    It does not change with time, so that only finitely many later requests go before it.
    """
    return request.since + (batch_delay_s if request.priority == "batch" else 0.0)


def groups(state: HostState) -> list[WaitingGroup]:
    """Return the waiting requests by model, in the order in which models are to be loaded."""
    members: dict[str, list[Waiting]] = {}
    for request in state.waiting:
        members.setdefault(request.model_id, []).append(request)
    delay = state.limits.batch_delay_s
    found = [
        WaitingGroup(
            model_id,
            requests[0].plans,
            min(request.since for request in requests),
            min(rank(request, delay) for request in requests),
            any(request.is_resumed for request in requests),
        )
        for model_id, requests in members.items()
    ]
    return sorted(found, key=lambda group: (group.rank, group.model_id))


def is_full(state: HostState, model_id: str) -> bool:
    """Whether no more requests may wait for the model."""
    count = sum(request.model_id == model_id for request in state.waiting)
    return count >= state.limits.waiting_per_model


def retry_after_s(state: HostState) -> int:
    """Return when another attempt is worth while: once what loads and waits has had its load.

    A load is taken to last as long as those of the resident models did on average.
    """
    limits = state.limits
    times = [resident.load_s for resident in state.residents if resident.load_s > 0]
    each = sum(times) / len(times) if times else limits.default_load_s
    models = {request.model_id for request in state.waiting}
    models.update(model.model_id for model in state.loading)
    return max(1, min(math.ceil(each * max(1, len(models))), limits.max_retry_s))


def overdue(waiting: Sequence[Waiting], now: float) -> list[Waiting]:
    """Return the requests whose deadline has come."""
    return [request for request in waiting if request.deadline <= now]
