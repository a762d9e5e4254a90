"""Compares a model's logits from batches, chunks and reused caches with those of a row alone."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.base import ModelInfo
from backends.engine.failures import RuntimeLost
from backends.trials import Reference, TrialResult, TrialRow, shortened

logger = logging.getLogger(__name__)

Logits = NDArray[np.float32]

_LONG, _SHORT, _CHUNK = 11, 3, 6
_STEPS = 2
# Rows this much longer than a sliding window; and the tokens by which a reused one is cut.
_BEYOND = 7
_CUT = 3
# Tokens computed in a trial beside those of a sliding window, about.
_BASE_TOKENS = 100
_PASSES_OF_A_WINDOW = 6

# Largest relative difference that rounding causes, by the type that is computed in.
TOLERANCES = {
    "float32": 0.01, "f32": 0.01,
    "float16": 0.05, "f16": 0.05,
    "bfloat16": 0.1, "bf16": 0.1,
}  # fmt: skip
# Scales and kernels of quantized weights depend on the shape of the batch.
QUANTIZED_TOLERANCE = 0.25
_LEAST_SPREAD = 1e-4
# Names in configurations for the tokens that a layer of local attention looks back at.
WINDOW_NAMES = (
    "sliding_window", "sliding_window_size", "attention_chunk_size", "window_size",
    "attention_window_size",
)  # fmt: skip
# Floating point operations of the trial beside the smallest one: about a second of two cores.
_MOST_OPERATIONS = 60e9


class TrialSubject(Protocol):
    """A runtime as its engine uses it; each call begins with an empty cache, and leaves none.

    Calls raise what the runtime raises.
    """

    @property
    def vocabulary_size(self) -> int:
        """Number of logits."""
        ...

    def alone(self, row: TrialRow) -> Logits:
        """Return the logits at the row's `lengths`, each computed in as few passes as possible."""
        ...

    def together(self, rows: Sequence[TrialRow], chunk: int) -> list[Logits]:
        """Return the logits of rows that are computed together, as the engine does.

        Prompts are computed in pieces of `chunk` tokens, beside the steps of shorter rows.
        """
        ...

    def reusing(self, row: TrialRow, donor: Sequence[int], shared: int) -> list[Logits]:
        """Return the row's logits with its first `shared` tokens from the cache of `donor`.

        One result for each way in which the engine does that; none if it never does.
        """
        ...


@dataclass(frozen=True, slots=True)
class TrialTerms:
    """How a model is tried.

    `tolerance` is the largest relative difference of right logits.  `windows` are the sliding
    windows of its layers in tokens; those that would take more than `most_tokens` are left out.
    """

    tolerance: float
    windows: tuple[int, ...] = ()
    most_tokens: int = 1 << 14
    most_length: int = 1 << 30

    @classmethod
    def of(
        cls, info: ModelInfo, config: Mapping[str, Any], context_tokens: int | None
    ) -> "TrialTerms":
        """Return the terms for a model file; `config` has the names of Hugging Face."""
        return cls(
            TOLERANCES.get(info.quantization, QUANTIZED_TOLERANCE),
            sliding_windows(config),
            affordable_tokens(info.parameters),
            rounded_length(min(context_tokens or info.context_length, info.context_length)),
        )


def rounded_length(tokens: int) -> int:
    """Return a power of two, at most `tokens`: most loads of a model then have the same terms."""
    return 1 << (max(tokens, 1).bit_length() - 1)


def affordable_tokens(parameters: int) -> int:
    """Return the tokens that a model of this size may compute in a trial."""
    return int(_MOST_OPERATIONS / (2 * max(parameters, 1)))


def sliding_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the windows of local attention that a configuration names, in tokens."""
    found = (config.get(name) for name in WINDOW_NAMES)
    return tuple(sorted({each for each in found if type(each) is int and each > 0}))


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of unequal lengths, the longest first, and the pieces of their prompts."""

    rows: tuple[TrialRow, ...]
    chunk: int
    donor: tuple[int, ...]
    shared: int


def run_trial(
    subject: TrialSubject, terms: TrialTerms, reference: Reference | None = None
) -> TrialResult:
    """Return what of `subject` is right; `reference` None means its own rows alone.

    A difference counts if it is found with two sets of tokens.  What the runtime raises is a
    failure of what was tried; a reference that raises, or gives NaN, is not used.
    """
    found = TrialResult()
    for first, second in _groups(subject.vocabulary_size, terms):
        result = _Comparison(subject, terms.tolerance, reference, first).result()
        if not result.is_right:
            result |= _Comparison(subject, terms.tolerance, reference, second).result()
        found &= result
    return found


def _groups(vocabulary: int, terms: TrialTerms) -> Iterator[tuple[_Group, _Group]]:
    """Yield groups of rows, each with two sets of tokens."""
    lengths = [(_LONG, _SHORT, _CHUNK, _LONG - 2 * _CUT)]
    for window in sorted(set(terms.windows)):
        length = window + _BEYOND
        is_short = length + _CUT + _STEPS <= terms.most_length
        if is_short and _PASSES_OF_A_WINDOW * length + _BASE_TOKENS <= terms.most_tokens:
            # The shorter row leaves the window while it is continued.
            lengths.append((length, max(window - 1, 1), length // 2 + 1, length - _CUT))
    for long, short, chunk, shared in lengths:
        if long + _CUT + _STEPS <= terms.most_length:
            one, other = (
                _group(_Tokens(vocabulary, seed), long, short, chunk, shared) for seed in (0, 1)
            )
            yield one, other


def _group(take: "_Tokens", long: int, short: int, chunk: int, shared: int) -> _Group:
    rows = tuple(TrialRow(take(length), take(_STEPS)) for length in (long, short))
    return _Group(rows, chunk, rows[0].prompt[:shared] + take(_CUT), shared)


class _Tokens:
    """Gives tokens of a vocabulary that are the same at each run; the first ones are special."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        # The generators of numpy take megabytes that would count as the model's.
        self._random = Random(7 + seed)
        # Logits may have more entries than there are tokens.
        self._low, self._high = vocabulary // 8, vocabulary // 2 + 1

    def __call__(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._low, self._high) for _ in range(count))


class _Comparison:
    """Compares one group of rows, and finds out what of it is wrong."""

    def __init__(
        self,
        subject: TrialSubject,
        tolerance: float,
        reference: Reference | None,
        group: _Group,
    ) -> None:
        self._subject = subject
        self._tolerance = tolerance
        self._reference = reference
        self._group = group
        self._wanted: list[Logits] = []
        self._reason = ""

    def result(self) -> TrialResult:
        """Return what is right."""
        subject, group = self._subject, self._group
        rows, longest = group.rows, len(group.rows[0].prompt)
        is_sound = has_cache = has_batches = has_chunks = True
        has_reference = self._read_reference()
        if not has_reference:
            self._wanted = self._own()
        if not self._wanted:
            return TrialResult(False, reason=self._reason)
        if not _are_finite(self._wanted):
            # Each request will tell so; nothing can be compared.
            return TrialResult()
        if not self._is_right("rows together", lambda: subject.together(rows, group.chunk)):
            self._reason, reason = "", self._reason
            if has_reference:
                is_sound = self._is_right(
                    "a row alone", lambda: [subject.alone(each) for each in rows]
                )
                self._wanted = self._wanted if is_sound else self._own() or self._wanted
            has_cache = self._is_right(
                "one token after others",
                lambda: [subject.together([each], longest)[0] for each in rows],
            )
            has_chunks = self._is_right(
                "a prompt in pieces",
                lambda: [subject.together([each], group.chunk)[0] for each in rows],
            )
            has_batches = self._is_right(
                "rows together", lambda: subject.together(rows, longest)
            ) and (not (is_sound and has_cache and has_chunks))
            self._reason = self._reason or reason
        has_reuse = self._has_reuse()
        flags = (is_sound, has_cache, has_batches, has_chunks, has_reuse)
        return TrialResult(*flags, "" if all(flags) else self._reason)

    def _read_reference(self) -> bool:
        """Set the logits that are right; False if no other runtime gives any that are finite."""
        if self._reference is None:
            return False
        try:
            self._wanted = [self._reference(row) for row in self._group.rows]
        except Exception as problem:
            logger.debug("the reference of a trial failed: %s", problem)
            self._wanted = []
        return bool(self._wanted) and _are_finite(self._wanted)

    def _own(self) -> list[Logits]:
        """Return the rows' logits alone; none if the runtime fails at that."""
        try:
            return [self._subject.alone(row) for row in self._group.rows]
        except RuntimeLost:
            raise
        except Exception as problem:
            self._note(f"a row alone fails: {str(problem) or type(problem).__name__}")
            return []

    def _has_reuse(self) -> bool:
        row, group = self._group.rows[0], self._group
        wanted = self._wanted[0]

        def reused() -> list[Logits]:
            found = self._subject.reusing(row, group.donor, group.shared)
            self._wanted = [wanted] * len(found)
            return found

        return self._is_right("a reused prefix", reused)

    def _is_right(self, what: str, compute: Callable[[], list[Logits]]) -> bool:
        try:
            found = compute()
        except RuntimeLost:
            raise
        except Exception as problem:
            logger.debug("%s failed in a trial", what, exc_info=True)
            return self._note(f"{what}: {str(problem) or type(problem).__name__}")
        pairs = zip(self._wanted[: len(found)], found, strict=True)
        differs = max((difference(one, other) for one, other in pairs), default=0.0)
        if differs <= self._tolerance:
            return True
        return self._note(f"{what}: the logits differ by {min(differs, 9.99):.0%}")

    def _note(self, reason: str) -> bool:
        self._reason = self._reason or shortened(reason)
        return False


def _are_finite(found: Sequence[Logits]) -> bool:
    return all(bool(np.isfinite(logits).all()) for logits in found)


def difference(wanted: Logits, found: Logits) -> float:
    """Return the largest relative difference of logits, (count, vocabulary) each.

    What all logits of a token have in common is left out: it changes no probability.
    """
    size = min(wanted.shape[-1], found.shape[-1])
    whole, second = (each[..., :size].astype(np.float64) for each in (wanted, found))
    one, other = (each - each.mean(-1, keepdims=True) for each in (whole, second))
    # Where all logits are nearly equal, only rounding is left of them.
    least = np.maximum(_LEAST_SPREAD * np.linalg.norm(whole, axis=-1), np.finfo(np.float32).tiny)
    norms = np.maximum(np.linalg.norm(one, axis=-1), least)
    differs = np.linalg.norm(one - other, axis=-1) / norms
    return float(np.nan_to_num(differs, nan=np.inf).max())
