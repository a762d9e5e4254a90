"""Tries at load whether a model's vectors depend on the padding of shorter rows in a batch."""

import logging

import numpy as np
from numpy.typing import NDArray

from backends.embedding.inputs import InputTokens, cut_tokens
from backends.embedding.model import EmbeddingModel
from core.errors import BrokenModel, ImpetusError

logger = logging.getLogger(__name__)

_SHORT = "A short text."
_LONG = "A longer text of several words, to whose length the short one is padded in a batch."
# Rounding in float16 and int8 changes less, a mask that is ignored more.
_LEAST_COSINE = 0.98
_LARGEST_SCORE_CHANGE = 0.02


def depends_on_padding(model: EmbeddingModel, max_tokens: int) -> bool:
    """Return whether a row in a padded batch gives another vector than alone; blocks.

    A batch that fails counts as another vector.  Raises BrokenModel if one row alone fails.
    """
    rows = [_row(model, text, max_tokens) for text in (_SHORT, _LONG)]
    if not all(rows):
        return False
    try:
        alone = np.asarray(model.encode(rows[:1]), np.float64)[0]
    except Exception as problem:
        reason = str(problem)[:300] or type(problem).__name__
        raise BrokenModel(
            f"The model cannot compute even a short text: {reason}", param="model"
        ) from problem
    if len(rows[0]) == len(rows[1]):
        return False
    try:
        padded = np.asarray(model.encode(rows), np.float64)[0]
    except Exception:
        logger.warning("a batch of two rows failed, so rows are not padded", exc_info=True)
        return True
    return not _are_alike(alone, padded)


def _row(model: EmbeddingModel, text: str, max_tokens: int) -> InputTokens:
    """Return the tokens of `text`; none if this vocabulary has no tokens for it."""
    try:
        ids = model.tokenize(text)
    except ImpetusError:
        return InputTokens(())
    return cut_tokens(ids, max_tokens, "end", model.special_tokens)


def _are_alike(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    if len(one) == 1:
        return bool(abs(one[0] - other[0]) <= _LARGEST_SCORE_CHANGE)
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return not lengths > 0 or float(one @ other) / lengths >= _LEAST_COSINE
