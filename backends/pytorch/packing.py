"""Chooses packed, separate or uncached rows for a transformers model, by a trial run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.engine.row_model import RowModel
from backends.engine.trial.checks import (
    TOLERANCES,
    WINDOW_NAMES,
    TrialTerms,
    affordable_tokens,
)
from backends.engine.trial.results import try_model
from backends.engine.trial.row_models import limited
from backends.pytorch.attention import NAME, register_attention
from backends.pytorch.linear import speed_up_linear_layers
from backends.pytorch.rows import PackedRows, SeparateRows, UncachedRows, layer_kinds
from backends.trials import Reference, TrialResult, TrialRow, shortened, tell
from core.errors import BrokenModel, EngineFailed

logger = logging.getLogger(__name__)

PACKED, SEPARATE, UNCACHED = "packed", "separate", "uncached"

_PACKED_LAYERS = frozenset({"full_attention", "sliding_attention"})
_PROBLEMS = (
    EngineFailed, RuntimeError, ValueError, TypeError, AttributeError, LookupError,
    NotImplementedError, ArithmeticError, AssertionError,
)  # fmt: skip

Hold = Callable[[], AbstractContextManager[None]]


def open_rows(model: Any, *, max_rows: int, result: TrialResult | None = None) -> RowModel:
    """Return the rows of a loaded model that a trial found right.

    `result` is that of an earlier `try_rows` with the same model; else the trial is made now.
    Raises BrokenModel.
    """
    result = result or try_rows(model)
    if result.choice == UNCACHED:
        return UncachedRows(model, max_rows)
    make = _packed if result.choice == PACKED else SeparateRows
    return limited(make(model, max_rows), result)


def try_rows(model: Any, hold: Hold = nullcontext, *, context_tokens: int = 1 << 30) -> TrialResult:
    """Try the kinds of rows, the fastest first, against the model's own forward pass; blocks.

    `choice` of the result is the first one that is right.  `hold` is held during each pass; no
    row is longer than `context_tokens`.  Raises BrokenModel if the model cannot be run at all.
    """
    own = _attention_of(model)
    reference = own_passes(model, hold)
    terms = _terms(model, context_tokens)
    reason = ""
    for choice, make in ((PACKED, _packed), (SEPARATE, SeparateRows), (UNCACHED, UncachedRows)):
        if choice == PACKED and _windows(model) is None:
            continue
        try:
            found = try_model(make(model, 8), terms, hold, reference)
        except _PROBLEMS as problem:
            found = TrialResult(False, reason=shortened(str(problem)))
        finally:
            if choice == PACKED:
                model.set_attn_implementation(own)
        reason = reason or found.reason
        if _is_usable(choice, found):
            has_cache = choice != UNCACHED or not reason
            return replace(found, has_cache=has_cache, reason=reason, choice=choice)
    raise BrokenModel(
        f"{type(model).__name__} cannot be run by transformers here: {reason}.", param="model"
    )


def limitations(model_name: str, result: TrialResult) -> tuple[str, ...]:
    """Return what the user should know of the rows that `open_rows` returns, a sentence each."""
    if result.choice == UNCACHED:
        return (
            f"{model_name} computes its whole text again for each token, which is slow: its KV "
            f"cache gives other logits ({result.reason}).",
        )
    if result.choice == SEPARATE and result.reason and result.has_all:
        return (
            f"{model_name} computes requests one after the other, not together ({result.reason}).",
        )
    return tell(model_name, result)


def _is_usable(choice: str, found: TrialResult) -> bool:
    if choice == PACKED:
        return found.is_right
    if choice == SEPARATE:
        return found.is_sound and found.has_cache
    return found.is_sound


def _packed(model: Any, max_rows: int) -> PackedRows:
    windows = _windows(model)
    assert windows is not None
    register_attention()
    speed_up_linear_layers(model)
    model.set_attn_implementation(NAME)
    return PackedRows(model, windows, max_rows)


def _terms(model: Any, context_tokens: int) -> TrialTerms:
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    parameters = sum(each.numel() for each in model.parameters())
    return TrialTerms(
        TOLERANCES.get(str(model.dtype).removeprefix("torch."), 0.0),
        window_sizes(model),
        affordable_tokens(parameters),
        min(context_tokens, longest if isinstance(longest, int) and longest > 0 else 1 << 30),
    )


def window_sizes(model: Any) -> tuple[int, ...]:
    """Return the different sliding windows of a model's layers, in tokens."""
    config = model.config.get_text_config(decoder=True)
    _, arguments = layer_kinds(model)
    noted = [options.get(name) for options in arguments for name in WINDOW_NAMES]
    noted += [getattr(config, name, None) for name in WINDOW_NAMES]
    return tuple(sorted({each for each in noted if type(each) is int and each > 0}))


def _windows(model: Any) -> list[int | None] | None:
    """Return each layer's sliding window, or None if rows cannot be packed."""
    kinds, arguments = layer_kinds(model)
    if not kinds or not _PACKED_LAYERS.issuperset(kinds) or not model.is_backend_compatible():
        return None
    return [options.get("sliding_window") for options in arguments]


def own_passes(model: Any, hold: Hold) -> Reference | None:
    """Return what computes rows by the model's own pass without a cache; None if it fails.

    It uses the attention that the model has now, whatever it is given later.
    """
    own = _attention_of(model)
    known = signature(model.forward).parameters
    cuts = "logits_to_keep" in known

    def compute(row: TrialRow) -> NDArray[np.float32]:
        import torch

        count = len(row.lengths)
        options: dict[str, Any] = {"logits_to_keep": count} if cuts else {}
        if "use_cache" in known:
            options["use_cache"] = False
        if "position_ids" in known:
            # As transformers' `generate` does; some architectures would begin elsewhere.
            options["position_ids"] = torch.arange(len(row.tokens), device=model.device)[None]
        ids = torch.tensor([row.tokens], device=model.device)
        with hold(), torch.inference_mode(), _attention(model, own):
            logits = model(input_ids=ids, **options).logits[0, -count:]
            found: NDArray[np.float32] = logits.float().cpu().numpy()
        return found

    try:
        compute(TrialRow((1, 2), (0,)))
    except _PROBLEMS as problem:
        logger.debug("%s has no pass without a cache: %s", type(model).__name__, problem)
        return None
    return compute


def _attention_of(model: Any) -> str:
    return getattr(model.config, "_attn_implementation", None) or "eager"


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Run a model with another attention for a while."""
    before = _attention_of(model)
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
