"""Eviction: which idle models to unload to free memory."""

from collections.abc import Iterable, Sequence

from scheduler.state import LedgerEntry, Limits

_SHORTEST_LOAD_S = 0.05


def regret(resident: LedgerEntry, now: float) -> float:
    """Return the expected cost of evicting the model: reload seconds per second of idleness.

    It falls to 0 as the keep-alive runs out.
    """
    idle_s = max(0.0, now - resident.used_at)
    cost = max(resident.load_s, _SHORTEST_LOAD_S) / (1.0 + idle_s)
    if resident.keep_alive_s is None:
        return cost
    left = 1.0 - idle_s / resident.keep_alive_s if resident.keep_alive_s > 0 else 0.0
    return cost * max(0.0, left)


def is_busy(resident: LedgerEntry, now: float, limits: Limits) -> bool:
    """Whether requests run on the model, or one was granted that has not arrived there yet."""
    if resident.in_flight:
        return True
    return resident.used_at <= resident.granted_at and now - resident.granted_at < limits.grant_s


def hold_s(resident: LedgerEntry, limits: Limits) -> float:
    """Return how long requests for other models wait while this model stays in use."""
    return min(limits.hold_factor * resident.load_s, limits.max_hold_s)


def is_held(resident: LedgerEntry, waiting_since: float, now: float, limits: Limits) -> bool:
    """Whether the model is protected from a request that waits since `waiting_since`.

    It is while it was used during the wait and recently, and the wait is short beside its load
    time: otherwise two clients would make two models replace each other for every request.
    """
    was_used_meanwhile = resident.used_at > waiting_since
    is_lately = now - resident.used_at < max(resident.load_s, _SHORTEST_LOAD_S)
    return was_used_meanwhile and is_lately and now - waiting_since < hold_s(resident, limits)


def victims(
    missing_bytes: int, candidates: Iterable[LedgerEntry], now: float
) -> Sequence[LedgerEntry] | None:
    """Return the models to unload to free `missing_bytes`; None if all of them are not enough.

    Picks the least regret per useful byte, then spares those that the others make superfluous,
    the most regretted first.
    """
    if missing_bytes <= 0:
        return ()
    # A model of zero bytes frees nothing.
    able = [resident for resident in candidates if resident.size_bytes > 0]
    chosen: list[LedgerEntry] = []
    freed = 0
    while freed < missing_bytes:
        if not able:
            return None
        left = missing_bytes - freed
        best = min(
            able,
            key=lambda resident: (
                regret(resident, now) / min(resident.size_bytes, left),
                resident.used_at,
                resident.model_id,
            ),
        )
        able.remove(best)
        chosen.append(best)
        freed += best.size_bytes
    for resident in sorted(chosen, key=lambda model: -regret(model, now)):
        if freed - resident.size_bytes >= missing_bytes:
            chosen.remove(resident)
            freed -= resident.size_bytes
    return chosen


def expired(residents: Iterable[LedgerEntry], now: float, limits: Limits) -> list[LedgerEntry]:
    """Return the idle models whose keep-alive has run out."""
    return [
        resident
        for resident in residents
        if resident.keep_alive_s is not None
        and resident.may_close
        and not is_busy(resident, now, limits)
        and now - resident.used_at >= resident.keep_alive_s
    ]
