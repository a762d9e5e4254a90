"""Compares next-token distributions and embeddings of a converted model with its source; pure.

The divergence is computed over the source's most probable tokens, with all others as one event:
a lower bound of the whole divergence, which differs from it by what the others share differently.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Tokens of the source that are compared one by one; models give the others almost nothing.
TOP_TOKENS = 1024
# exp() of more would not be a finite number.
_LARGEST_EXPONENT = 700.0
_PERCENTILE = 99
# Fits float32, as which it is kept.
_LEAST_LOGPROB = -1e30


@dataclass(frozen=True, slots=True)
class QualityFigure:
    """How a converted model differs from its source; what was not measured is None.

    `tokens`: positions of the text that were compared.  `kl_mean` and `kl_p99`: mean and 99th
    percentile of the Kullback-Leibler divergence of the result from the source, in nats.
    `same_top_share`: share of positions at which both find the same token most probable.
    `cosine_mean` and `cosine_least`: similarity of embeddings of `tokens` texts.  `reason` says why
    something was not measured, or what else was found.
    """

    tokens: int = 0
    kl_mean: float | None = None
    kl_p99: float | None = None
    same_top_share: float | None = None
    perplexity_source: float | None = None
    perplexity_result: float | None = None
    cosine_mean: float | None = None
    cosine_least: float | None = None
    reason: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether the result was compared with its source."""
        return self.kl_mean is not None or self.cosine_mean is not None

    def to_json(self) -> str:
        """Return the figure as a JSON object; it has no NaN and no infinity."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "QualityFigure":
        """Return the figure that `to_json` wrote; unknown keys are left out."""
        known = {each.name for each in fields(QualityFigure)}
        return QualityFigure(**{k: v for k, v in json.loads(text).items() if k in known})


@dataclass(frozen=True, slots=True)
class Position:
    """A source's distribution after one token, in natural logarithms.

    `top_ids` (k,) are its most probable tokens, the first of all first; `top_logprobs` (k,) their
    log-probabilities, `rest_logprob` that of all others together, `next_logprob` that of the token
    that follows in the text.
    """

    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    rest_logprob: float
    next_logprob: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A result compared with its source at one position."""

    divergence: float
    has_same_top: bool
    next_logprob: float


def position_of(logits: NDArray[np.float32], next_token: int, top: int = TOP_TOKENS) -> Position:
    """Return what is kept of a source's finite `logits`, shape (vocabulary,)."""
    logprobs = _log_softmax(logits)
    count = min(top, len(logprobs))
    ids = np.argpartition(-logprobs, count - 1)[:count]
    ids = ids[np.argsort(-logprobs[ids], kind="stable")]
    return Position(
        ids.astype(np.int32),
        logprobs[ids].astype(np.float32),
        _log_sum_without(logprobs, ids),
        float(logprobs[next_token]),
    )


def difference(source: Position, logits: NDArray[np.float32], next_token: int) -> Difference:
    """Compare a result's finite `logits`, shape (vocabulary,), with its source's distribution.

    The vocabularies may differ in unused tokens at their end.
    """
    logprobs = _log_softmax(logits)
    is_known = source.top_ids < len(logprobs)
    ids, expected = source.top_ids[is_known], source.top_logprobs[is_known].astype(np.float64)
    rest = np.exp(source.rest_logprob) + np.exp(source.top_logprobs[~is_known]).sum()
    divergence = float((np.exp(expected) * (expected - logprobs[ids])).sum())
    found_rest = _log_sum_without(logprobs, ids)
    if rest > 0 and math.isfinite(found_rest):
        divergence += float(rest * (np.log(rest) - found_rest))
    # Rounding can give a little less than none.
    return Difference(
        max(divergence, 0.0),
        int(logprobs.argmax()) == int(source.top_ids[0]),
        float(logprobs[next_token]),
    )


def language_figure(
    source_logprobs: Sequence[float], differences: Sequence[Difference], reason: str = ""
) -> QualityFigure:
    """Return the figure of as many positions as there are differences, at least one.

    `source_logprobs` are the source's of the text's tokens at these positions.
    """
    divergences = [each.divergence for each in differences]
    return QualityFigure(
        tokens=len(differences),
        kl_mean=float(np.mean(divergences)),
        kl_p99=float(np.percentile(divergences, _PERCENTILE)),
        same_top_share=float(np.mean([each.has_same_top for each in differences])),
        perplexity_source=perplexity(source_logprobs[: len(differences)]),
        perplexity_result=perplexity(each.next_logprob for each in differences),
        reason=reason,
    )


def perplexity(logprobs: Iterable[float]) -> float:
    """Return the perplexity of a text whose tokens have these log-probabilities; finite."""
    mean = -float(np.mean(list(logprobs)))
    return math.exp(min(mean, _LARGEST_EXPONENT))


def embedding_figure(
    source: NDArray[np.float32], result: NDArray[np.float32], reason: str = ""
) -> QualityFigure:
    """Return the figure of finite vectors of the same texts, each (texts, dimension)."""
    if source.shape[1] != result.shape[1]:
        raise ValueError("The vectors have different dimensions.")
    count = min(len(source), len(result))
    first, second = _units(source[:count]), _units(result[:count])
    cosines = np.clip((first * second).sum(axis=1), -1.0, 1.0)
    return QualityFigure(
        tokens=count,
        cosine_mean=float(cosines.mean()),
        cosine_least=float(cosines.min()),
        reason=reason,
    )


def _units(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.where(lengths > 0, lengths, 1.0)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    logprobs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return np.maximum(logprobs, _LEAST_LOGPROB)


def _log_sum_without(logprobs: NDArray[np.float64], ids: NDArray[Any]) -> float:
    """Return the logarithm of the others' probability; minus infinity if there are none."""
    is_other = np.ones(len(logprobs), bool)
    is_other[ids] = False
    others = logprobs[is_other]
    if not len(others):
        return -math.inf
    peak = float(others.max())
    return peak + math.log(float(np.exp(others - peak).sum()))
