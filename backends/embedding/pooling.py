"""Pools token vectors into text vectors, in the ways that sentence-transformers knows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Pooling:
    """How token vectors are pooled; `mode` is one of `MODES`, or several joined by "+".

    `normalize` makes unit vectors.
    """

    mode: str = "mean"
    normalize: bool = True


def pool(
    hidden: NDArray[np.floating[Any]],
    mask: NDArray[Any],
    pooling: Pooling,
    tokens: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """Pool `hidden` (b, t, d) into vectors, float32 (b, d).

    `mask` (b, t) is 0 at what is not pooled, such as padding on either side.  Several modes give
    a vector of d values each, concatenated.  A row without tokens gives zeros.  `tokens` (b, t)
    is 1 at all tokens, also those that are not pooled: positions are counted from the first one.
    """
    weights = np.asarray(mask, np.float32)
    positions = np.cumsum(weights if tokens is None else np.asarray(tokens, np.float32), axis=1)
    values = np.asarray(hidden, np.float32)
    vectors = [
        _weighted_mean(values, weights, positions)
        if mode == "weighted_mean"
        else _POOLERS[mode](values, weights)
        for mode in pooling.mode.split("+")
    ]
    joined = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1)
    return unit(joined) if pooling.normalize else joined


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalise `vectors` (b, d) to unit length; zeros stay zeros, NaN and infinity give NaN."""
    # Squares of large float32 values overflow it.
    exact = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray(exact / np.where(lengths == 0, 1, lengths), np.float32)


def _mean(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    counts = _at_least_one(weights.sum(axis=1, keepdims=True))
    return np.asarray(_weighted_sum(values, weights) / counts, np.float32)


def _mean_sqrt_len(
    values: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    counts = _at_least_one(weights.sum(axis=1, keepdims=True))
    return np.asarray(_weighted_sum(values, weights) / np.sqrt(counts), np.float32)


def _weighted_mean(
    values: NDArray[np.float32], weights: NDArray[np.float32], positions: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Weight each token by its position, counted from one."""
    return _mean(values, weights * positions)


def _max(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = np.where(weights[:, :, None] > 0, values, -np.inf).max(axis=1)
    has_tokens = weights.sum(axis=1, keepdims=True) > 0
    return np.asarray(np.where(has_tokens, largest, 0), np.float32)


def _cls(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    return _at(values, weights, np.argmax(weights > 0, axis=1))


def _last(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    from_end = np.argmax(weights[:, ::-1] > 0, axis=1)
    return _at(values, weights, weights.shape[1] - 1 - from_end)


def _at(
    values: NDArray[np.float32], weights: NDArray[np.float32], places: NDArray[np.intp]
) -> NDArray[np.float32]:
    rows = np.arange(len(values))
    has_tokens = weights[rows, places] > 0
    return np.asarray(values[rows, places] * has_tokens[:, None], np.float32)


def _weighted_sum(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    # Padding may hold anything, NaN too, so it is replaced instead of multiplied by zero.
    kept = np.where(weights[:, :, None] > 0, values, 0)
    return np.asarray(np.einsum("btd,bt->bd", kept, weights), np.float32)


def _at_least_one(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.maximum(counts, 1), np.float32)


_Pooler = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
_POOLERS: Mapping[str, _Pooler] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "last": _last,
}
MODES = (*_POOLERS, "weighted_mean")
