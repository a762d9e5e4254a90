"""Chooses packed or separate rows for a transformers model, by configuration and a trial run."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.engine.row_model import RowInput, RowModel
from backends.pytorch.attention import NAME, register_attention
from backends.pytorch.linear import speed_up_linear_layers
from backends.pytorch.rows import PackedRows, SeparateRows, layer_kinds
from core.errors import EngineFailed

logger = logging.getLogger(__name__)

_PACKED_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Largest relative difference that rounding causes between both ways.
_TOLERANCE = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.1}


def open_rows(model: Any, *, max_rows: int) -> RowModel:
    """Return packed rows if they are correct for a loaded model, else separate rows.

    Packing needs a configuration that allows it and, for a few tokens, the same logits as the
    model's own forward pass.
    """
    windows = _windows(model)
    if windows is None:
        return SeparateRows(model, max_rows)
    own = getattr(model.config, "_attn_implementation", None) or "eager"
    try:
        wanted = _reference_logits(model, _check_tokens(model))
        register_attention()
        speed_up_linear_layers(model)
        model.set_attn_implementation(NAME)
        packed = PackedRows(model, windows, max_rows)
        if _agree(wanted, _packed_logits(packed, _check_tokens(model)), str(model.dtype)):
            packed.native_cpu_s = 0.0
            return packed
        reason = "different logits"
    except (EngineFailed, RuntimeError, ValueError, TypeError, AttributeError) as problem:
        reason = str(problem)
    logger.warning(
        "%s runs one row per forward pass: packing gave %s", type(model).__name__, reason
    )
    model.set_attn_implementation(own)
    return SeparateRows(model, max_rows)


def _windows(model: Any) -> list[int | None] | None:
    """Return each layer's sliding window, or None if rows cannot be packed."""
    kinds, arguments = layer_kinds(model)
    if not kinds or not _PACKED_LAYERS.issuperset(kinds) or not model.is_backend_compatible():
        return None
    return [options.get("sliding_window") for options in arguments]


def _check_tokens(model: Any) -> list[list[int]]:
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    return [
        [(7 + 31 * index) % size for index in range(9)],
        [(3 + index) % size for index in (1, 5)],
    ]


def _reference_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    import torch

    with torch.inference_mode():
        found = [model(input_ids=torch.tensor([row], device=model.device)).logits for row in rows]
    return [logits[0, -1].float().cpu().numpy() for logits in found]


def _packed_logits(packed: PackedRows, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Compute the rows together in two steps, which also tests caches and positions."""
    ids = [packed.open_row(len(row)) for row in rows]
    packed.extend([RowInput(i, row[:-1]) for i, row in zip(ids, rows, strict=True)])
    logits = packed.extend([RowInput(i, row[-1:]) for i, row in zip(ids, rows, strict=True)])
    for i in ids:
        packed.close_row(i)
    return list(logits)


def _agree(
    wanted: Sequence[NDArray[np.float32]], found: Sequence[NDArray[np.float32]], dtype: str
) -> bool:
    tolerance = _TOLERANCE.get(dtype.removeprefix("torch."), 0.0)
    return all(
        bool(np.linalg.norm(one[: len(other)] - other) <= tolerance * np.linalg.norm(one))
        for one, other in zip(wanted, found, strict=True)
    )
