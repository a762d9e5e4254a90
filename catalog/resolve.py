"""The choice between a model's variants: pure."""

from collections.abc import Collection, Sequence

from catalog.models import ModelRecord

# On Apple silicon; elsewhere the order matters less than that there is one.
_FASTEST = ("mlx", "gguf", "safetensors", "onnx", "pytorch", "coreml")


def best_variant(
    candidates: Sequence[ModelRecord], resident_ids: Collection[str], budget_bytes: int
) -> ModelRecord:
    """Return the variant to use where a bare name leaves the choice.

    (1) Only usable ones count, unless there is none, and those of a slow reference runtime only
    where there is no other.  (2) A resident one wins.  (3) Else the most precise whose files take
    at most half of the budget, so that another model still fits; of equally precise ones the
    fastest format's.  (4) Else the smallest.  Equals are decided by id.
    Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError("no candidates")
    pool = [record for record in candidates if record.state == "ok"] or list(candidates)  # (1)
    pool = [record for record in pool if not _is_slow(record)] or pool
    resident = [record for record in pool if record.id in resident_ids]
    if resident:
        return min(resident, key=_best_first)  # (2)
    fitting = [record for record in pool if record.info.size_bytes <= budget_bytes // 2]
    if fitting:
        return min(fitting, key=_best_first)  # (3)
    return min(pool, key=lambda record: (record.info.size_bytes, record.id))  # (4)


def _is_slow(record: ModelRecord) -> bool:
    return record.info.details.get("runtime") == "reference"


def _best_first(record: ModelRecord) -> tuple[int, int, int, str]:
    """Order by whole bits a weight, then by format, then by size."""
    info = record.info
    bits = round(8 * info.size_bytes / info.parameters) if info.parameters else 0
    rank = _FASTEST.index(info.format) if info.format in _FASTEST else len(_FASTEST)
    return -bits, rank, -info.size_bytes, record.id
