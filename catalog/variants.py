"""Chooses between the variants of a model (formats and quantizations); pure."""

from collections.abc import Callable, Collection, Sequence

from catalog.models import ModelRecord

# The order on Apple silicon; elsewhere any fixed order will do.
_FASTEST = ("mlx", "gguf", "safetensors", "onnx", "pytorch", "coreml")

# Formats whose quantized weights are unpacked while they load, to at least 16 bits each.
_DEQUANTIZED = ("safetensors", "pytorch")
_FLOATS = ("f16", "f32", "f64", "bf16", "mixed", "")
_HALF_BYTES = 2


def best_variant(
    candidates: Sequence[ModelRecord],
    resident_ids: Collection[str],
    budget_bytes: int,
    *,
    keeps_cool: bool = False,
) -> ModelRecord:
    """Return the variant to use for a bare model name.

    (1) Unusable variants are ignored unless there are no others; so are those on a slow
    reference runtime.  (2) With `keeps_cool` the smallest wins, because it moves the fewest bytes
    per token; on a tie a resident one.  (3) Else a resident one wins.  (4) Else the most precise
    one whose weights take at most half of the budget, leaving room for another model; on a tie the
    fastest format.  (5) Else the smallest.  Remaining ties are decided by id.  Raises ValueError
    without candidates.
    """
    if not candidates:
        raise ValueError("no candidates")
    pool = [record for record in candidates if record.state == "ok"] or list(candidates)  # (1)
    pool = [record for record in pool if not _is_slow(record)] or pool
    if keeps_cool:  # (2)
        return min(pool, key=lambda one: (_bytes(one), one.id not in resident_ids, one.id))
    resident = [record for record in pool if record.id in resident_ids]
    if resident:
        return min(resident, key=_best_first)  # (3)
    fitting = [record for record in pool if _bytes(record) <= budget_bytes // 2]
    if fitting:
        return min(fitting, key=_best_first)  # (4)
    return min(pool, key=lambda record: (_bytes(record), record.id))  # (5)


def nearest_smaller(
    record: ModelRecord, others: Sequence[ModelRecord], fits: Callable[[ModelRecord], bool]
) -> ModelRecord | None:
    """Return the largest usable variant of the same model that is smaller and fits, if any."""
    variants = [
        other
        for other in others
        if other.info.name == record.info.name
        and other.state == "ok"
        and _bytes(other) < _bytes(record)
        and other.info.capabilities >= record.info.capabilities
        and fits(other)
    ]
    return max(variants, key=lambda other: (_bytes(other), other.id), default=None)


def _bytes(record: ModelRecord) -> int:
    """Return the bytes of weights in memory: those of the files, unless they are dequantized."""
    info = record.info
    is_dequantized = (
        info.format in _DEQUANTIZED
        and info.quantization not in _FLOATS
        and "mlx_bits" not in info.details
    )
    return (
        max(info.size_bytes, info.parameters * _HALF_BYTES) if is_dequantized else info.size_bytes
    )


def _is_slow(record: ModelRecord) -> bool:
    return record.info.details.get("runtime") == "reference"


def _best_first(record: ModelRecord) -> tuple[int, int, int, str]:
    """Sort key: whole bits per weight, then format, then size."""
    info = record.info
    bits = round(8 * info.size_bytes / info.parameters) if info.parameters else 0
    rank = _FASTEST.index(info.format) if info.format in _FASTEST else len(_FASTEST)
    return -bits, rank, -info.size_bytes, record.id
