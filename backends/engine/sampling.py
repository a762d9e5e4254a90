"""Samples the next token from logits, for runtimes without samplers of their own."""

import secrets
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from backends.grammar.constraint import TokenMask
from backends.stepper import SequenceSpec
from core.errors import NonFiniteOutput, NoTokenLeft, RequestError
from core.types import SamplingParams, TokenLogprob

# The defaults of llama.cpp's tools, for values that neither the request nor the model sets.
DEFAULT_TEMPERATURE = 0.8
DEFAULT_TOP_K = 40
DEFAULT_TOP_P = 0.95
DEFAULT_MIN_P = 0.05

# Without top-k, this many of the likeliest tokens are sorted first; more only if needed.
_FIRST_SORTED = 256
# Differences of logits, divided by less, would overflow.
_SMALLEST_TEMPERATURE = 1e-30
_LARGEST = float(np.finfo(np.float32).max)

Number = TypeVar("Number", int, float)


def or_default(value: Number | None, default: Number) -> Number:
    """Return `value`, or `default` where it is None."""
    return default if value is None else value


def check_finite(logits: NDArray[np.float32]) -> None:
    """Raise NonFiniteOutput if a model computed NaN or infinity; takes microseconds.

    Call it before anything is masked: a masked logit is -inf.
    """
    if not np.isfinite(logits).all():
        raise NonFiniteOutput.of("logits")


def no_token_left(mask: TokenMask | None) -> NoTokenLeft:
    """Return the error of a sequence all of whose next tokens are excluded."""
    problem = mask.problem if mask is not None else ""
    fields = "the answer's grammar, logit_bias and bad_words"
    reason = problem.rstrip(".") or f"{fields} together exclude them all"
    return NoTokenLeft(
        f"No token may come next: {reason}. Simplify the JSON schema or grammar, or remove entries "
        "of logit_bias or bad_words."
    )


def token_logprob(
    logits: NDArray[np.float32], token_id: int, top: int, piece: Callable[[int], bytes]
) -> TokenLogprob:
    """Return the natural-log probability of `token_id` and of the `top` likeliest tokens."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits.astype(np.float64) - peak).sum()))

    def entry(token: int, others: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(token, piece(token), float(logits[token]) - total, others)

    if top == 0:
        return entry(token_id)
    likely = np.argpartition(logits, -top)[-top:]
    likely = likely[np.argsort(-logits[likely], kind="stable")]
    return entry(token_id, tuple(entry(int(token)) for token in likely))


class RowSampler:
    """Samples one sequence's tokens; holds its penalties and random state.

    The order is llama.cpp's: bias, penalties, top-k, top-p, min-p, temperature.  Not
    thread-safe: used on the stepper's thread only.
    """

    def __init__(
        self, spec: SequenceSpec, vocabulary_size: int, piece: Callable[[int], bytes]
    ) -> None:
        """Check the request.  Raises RequestError for ids outside the vocabulary."""
        params = spec.sampling
        for token_id in params.logit_bias:
            if not 0 <= token_id < vocabulary_size:
                raise RequestError(
                    f"logit_bias names token {token_id}, but the vocabulary has "
                    f"{vocabulary_size} tokens.",
                    param="logit_bias",
                )
        if any(not 0 <= token_id < vocabulary_size for token_id in spec.prompt):
            raise RequestError(
                f"The prompt has a token id outside the vocabulary of {vocabulary_size} tokens.",
                param="prompt",
            )
        self._params = params
        self._piece = piece
        self._mask = spec.mask
        temperature = or_default(params.temperature, DEFAULT_TEMPERATURE)
        self._temperature = max(temperature, _SMALLEST_TEMPERATURE) if temperature else 0.0
        self._random: np.random.Generator | None = None
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        # OpenAI documents -100 as a ban and 100 as exclusive selection.
        self._bias = np.array(
            [-np.inf if bias <= -100 else bias for bias in params.logit_bias.values()], np.float32
        )
        self._seen = set(spec.prompt) if params.repetition_penalty != 1.0 else set()
        self._generated: Counter[int] = Counter()
        if params.frequency_penalty or params.presence_penalty:
            self._generated.update(spec.prompt[len(spec.prompt) - spec.generated :])
        self._skipped = spec.generated
        self._changes_nothing = self._is_plain(params)

    @property
    def is_greedy(self) -> bool:
        """Whether it always takes the likeliest token, with no mask, bias or log-probabilities."""
        return self._temperature == 0.0 and self._changes_nothing

    def _is_plain(self, params: SamplingParams) -> bool:
        return (
            self._mask is None
            and params.top_logprobs is None
            and not params.logit_bias
            and not params.frequency_penalty
            and not params.presence_penalty
            and params.repetition_penalty == 1.0
        )

    def sample(self, logits: NDArray[np.float32]) -> tuple[int, TokenLogprob | None]:
        """Sample from `logits`, shape (vocabulary,), which may be changed in place.

        Raises NonFiniteOutput, NoTokenLeft if no token is allowed, and what the mask raises.
        """
        check_finite(logits)
        if self._changes_nothing:
            return self._choose(logits), None
        top = self._params.top_logprobs
        # Log-probabilities are those of the model: mask and penalties change the logits.
        original = logits.copy() if top is not None else logits
        self._shape(logits)
        token_id = self._choose(logits)
        if self._mask is not None:
            self._mask.accept(token_id)
        if self._params.repetition_penalty != 1.0:
            self._seen.add(token_id)
        if self._params.frequency_penalty or self._params.presence_penalty:
            self._generated[token_id] += 1
        if top is None:
            return token_id, None
        return token_id, token_logprob(original, token_id, top, self._piece)

    def _shape(self, logits: NDArray[np.float32]) -> None:
        """Apply mask, bias and penalties in place."""
        params = self._params
        if self._mask is not None and self._mask.is_active:
            self._mask.apply(logits)
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if self._seen:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            # A tiny penalty would overflow float32.
            values = logits[ids].astype(np.float64)
            penalty = params.repetition_penalty
            shaped = np.where(values > 0, values / penalty, values * penalty)
            logits[ids] = np.clip(shaped, -_LARGEST, _LARGEST, where=values > -np.inf, out=shaped)
        if self._generated:
            ids = np.fromiter(self._generated.keys(), np.int64, len(self._generated))
            counts = np.fromiter(self._generated.values(), np.float32, len(self._generated))
            logits[ids] -= counts * params.frequency_penalty + params.presence_penalty

    def _choose(self, logits: NDArray[np.float32]) -> int:
        best = int(logits.argmax())
        if logits[best] == -np.inf:
            raise no_token_left(self._mask)
        if self._temperature == 0.0:
            return best
        ids, values = self._candidates(logits, logits[best])
        weights = np.exp((values.astype(np.float64) - values[0]) / self._temperature)
        if self._random is None:
            self._random = np.random.default_rng(_seed(self._params.seed))
            # A resumed answer has drawn one number for each of its tokens.
            self._random.random(self._skipped)
        drawn = self._random.random() * weights.sum()
        place = int(np.searchsorted(weights.cumsum(), drawn, side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def _candidates(
        self, logits: NDArray[np.float32], peak: np.float32
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return ids and logits that pass top-k, top-p and min-p, the likeliest first."""
        top_k = or_default(self._params.top_k, DEFAULT_TOP_K)
        top_p = or_default(self._params.top_p, DEFAULT_TOP_P)
        min_p = or_default(self._params.min_p, DEFAULT_MIN_P)
        limit = min(top_k, len(logits)) if top_k > 0 else len(logits)
        ids = _likeliest(logits, limit if top_k > 0 or top_p >= 1.0 else _FIRST_SORTED)
        if top_p < 1.0:
            pool = logits[ids] if top_k > 0 else logits
            total = float(np.exp(pool.astype(np.float64) - peak).sum())
            while (count := _nucleus(logits[ids], peak, top_p * total)) > len(ids) < limit:
                ids = _likeliest(logits, min(len(ids) * 8, limit))
            ids = ids[: max(count, 1)]
        values = logits[ids]
        keep = values > -np.inf
        if min_p > 0.0:
            keep &= values >= peak + np.float32(np.log(min_p))
        keep[0] = True
        return ids[keep], values[keep]


def _likeliest(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` largest logits, the largest first; ties by id."""
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    ids = np.argpartition(logits, -count)[-count:]
    ids.sort()
    return ids[np.argsort(-logits[ids], kind="stable")]


def _nucleus(values: NDArray[np.float32], peak: np.float32, wanted: float) -> int:
    """Return how many of the sorted `values` sum up to `wanted`; len + 1 if all do not."""
    reached = np.exp(values.astype(np.float64) - peak).cumsum()
    return int(np.searchsorted(reached, wanted, side="left")) + 1


def _seed(seed: int | None) -> int:
    """Fold any integer into an unsigned 64-bit number; None gives a random one."""
    return secrets.randbits(64) if seed is None else seed & 0xFFFFFFFFFFFFFFFF
