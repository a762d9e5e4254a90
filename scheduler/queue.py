"""Queue of waiting requests: order, bounds and retry estimates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.state import HostState, LoadPlan, Waiting


@dataclass(frozen=True, slots=True)
class WaitingGroup:
    """All requests that wait for one model.

    `since` is the arrival of the oldest; groups are ordered by `rank`, smallest first.
    `is_resumed`: the answer of one of them has begun.
    """

    model_id: str
    plans: tuple[LoadPlan, ...]
    since: float
    rank: float
    is_resumed: bool = False


def rank(request: Waiting, batch_delay_s: float) -> float:
    """Return the sort key of a request: its arrival, delayed for a batch request.

    It is constant, so only finitely many later requests can overtake it.
    """
    return request.since + (batch_delay_s if request.priority == "batch" else 0.0)


def groups(state: HostState) -> list[WaitingGroup]:
    """Return the waiting requests grouped by model, in the order in which to load the models."""
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
    """Whether the model's queue is full."""
    count = sum(request.model_id == model_id for request in state.waiting)
    return count >= state.limits.waiting_per_model


def retry_after_s(state: HostState) -> int:
    """Return the Retry-After estimate: the time to load every model that loads or is waited for.

    Each load is estimated as the average load time of the resident models.
    """
    limits = state.limits
    times = [resident.load_s for resident in state.residents if resident.load_s > 0]
    each = sum(times) / len(times) if times else limits.default_load_s
    models = {request.model_id for request in state.waiting}
    models.update(model.model_id for model in state.loading)
    return max(1, min(math.ceil(each * max(1, len(models))), limits.max_retry_s))


def overdue(waiting: Sequence[Waiting], now: float) -> list[Waiting]:
    """Return the requests whose deadline has passed."""
    return [request for request in waiting if request.deadline <= now]
