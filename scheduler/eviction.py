"""Which models make room."""

from collections.abc import Iterable, Sequence

from scheduler.state import LedgerEntry, Limits

_SHORTEST_LOAD_S = 0.05


def regret(resident: LedgerEntry, now: float) -> float:
    """Return what losing the model is likely to cost: seconds of reload a second of idleness.

    A keep-alive lowers it towards 0 at its end.
    """
    idle_s = max(0.0, now - resident.used_at)
    cost = max(resident.load_s, _SHORTEST_LOAD_S) / (1.0 + idle_s)
    if resident.keep_alive_s is None:
        return cost
    left = 1.0 - idle_s / resident.keep_alive_s if resident.keep_alive_s > 0 else 0.0
    return cost * max(0.0, left)


def is_busy(resident: LedgerEntry, now: float, limits: Limits) -> bool:
    """Whether requests run on the model or one was sent that has not been seen there yet."""
    if resident.in_flight:
        return True
    return resident.used_at <= resident.granted_at and now - resident.granted_at < limits.grant_s


def hold_s(resident: LedgerEntry, limits: Limits) -> float:
    """Return how long others wait for the model's place while it goes on being used."""
    return min(limits.hold_factor * resident.load_s, limits.max_hold_s)


def is_held(resident: LedgerEntry, waiting_since: float, now: float, limits: Limits) -> bool:
    """Whether the model keeps its place against a request that waits since `waiting_since`.

    So it does when it was used meanwhile, lately, and the wait does not outweigh its load yet:
    otherwise clients of two models would have them loaded in turn for every single request.
    """
    was_used_meanwhile = resident.used_at > waiting_since
    is_lately = now - resident.used_at < max(resident.load_s, _SHORTEST_LOAD_S)
    return was_used_meanwhile and is_lately and now - waiting_since < hold_s(resident, limits)


def victims(
    missing_bytes: int, candidates: Iterable[LedgerEntry], now: float
) -> Sequence[LedgerEntry] | None:
    """Return whom to unload to free `missing_bytes`; None when all candidates are too little.

    Chosen by the least regret for the bytes that count, then without those that the others
    make superfluous, the dearest being spared first.
    """
    if missing_bytes <= 0:
        return ()
    # A model without memory frees nothing.
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
    """Return the idle models whose keep-alive is over."""
    return [
        resident
        for resident in residents
        if resident.keep_alive_s is not None
        and resident.may_close
        and not is_busy(resident, now, limits)
        and now - resident.used_at >= resident.keep_alive_s
    ]
