"""Which models make room."""

from collections.abc import Iterable, Sequence

from scheduler.state import Resident


def victims(needed_bytes: int, residents: Iterable[Resident]) -> Sequence[Resident] | None:
    """Return whom to unload to free `needed_bytes`; None when all unpinned ones are too little.

    Idle models go before busy ones, which are drained first, and among equals the one that was
    used longest ago.
    """
    if needed_bytes <= 0:
        return ()
    candidates = sorted(
        (resident for resident in residents if not resident.is_pinned),
        key=lambda resident: (resident.in_flight > 0, resident.used_at, resident.model_id),
    )
    chosen: list[Resident] = []
    freed = 0
    for resident in candidates:
        if freed >= needed_bytes:
            break
        # A model without memory frees nothing.
        if resident.size_bytes:
            chosen.append(resident)
            freed += resident.size_bytes
    return chosen if freed >= needed_bytes else None
