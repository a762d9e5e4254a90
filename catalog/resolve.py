"""The choice between a model's variants: pure."""

from collections.abc import Collection, Sequence

from catalog.models import ModelRecord


def best_variant(
    candidates: Sequence[ModelRecord], resident_ids: Collection[str], budget_bytes: int
) -> ModelRecord:
    """Return the variant to use where a bare name leaves the choice.

    (1) Only usable ones count, unless there is none.  (2) A resident one wins.  (3) Else the
    largest whose files take at most half of the budget, so that another model still fits.
    (4) Else the smallest.  Equals are decided by id.  Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError("no candidates")
    pool = [record for record in candidates if record.state == "ok"] or list(candidates)  # (1)
    resident = [record for record in pool if record.id in resident_ids]
    if resident:
        return min(resident, key=_largest_first)  # (2)
    fitting = [record for record in pool if record.info.size_bytes <= budget_bytes // 2]
    if fitting:
        return min(fitting, key=_largest_first)  # (3)
    return min(pool, key=lambda record: (record.info.size_bytes, record.id))  # (4)


def _largest_first(record: ModelRecord) -> tuple[int, str]:
    return -record.info.size_bytes, record.id
