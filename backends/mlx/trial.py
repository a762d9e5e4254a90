"""Tries a model on mlx-lm's batches, as `MlxStepper` uses them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineOptions, ModelInfo
from backends.engine.trial.checks import (
    QUANTIZED_TOLERANCE,
    TOLERANCES,
    Logits,
    TrialTerms,
    affordable_tokens,
    rounded_length,
    run_trial,
    sliding_windows,
)
from backends.engine.trial.results import known_result, trial_key, tried
from backends.mlx.batch import ENDLESS, MlxBatch
from backends.mlx.metal import computing
from backends.mlx.model import MlxModel
from backends.mlx.prefixes import cut
from backends.trials import OtherRuntimeNeeded, TrialOptions, TrialResult, TrialRow
from core.errors import EngineFailed

logger = logging.getLogger(__name__)

_LIBRARIES = ("mlx", "mlx-lm", "torch", "transformers")
# A row's logits of all its tokens are computed at once.
_MOST_LOGITS = 1 << 26
# More passes than any row of a trial takes.
_MOST_PASSES = 4096


class _Forced:
    """Chooses given tokens for a row and records the logits; stands for a `RowChoice`."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._wanted = len(tokens) + 1
        self.logits: list[NDArray[np.float32]] = []

    @property
    def is_done(self) -> bool:
        return len(self.logits) >= self._wanted

    def process(self, _: Any, logits: Any) -> Any:
        import mlx.core as mx

        self.choose(np.array(logits[0].astype(mx.float32)))
        return logits

    def sample(self, _: Any) -> Any:
        import mlx.core as mx

        return mx.array([self._token(len(self.logits) - 1)], mx.uint32)

    def choose(self, logits: Any) -> int:
        if not self.is_done:
            self.logits.append(np.array(logits, np.float32))
        return self._token(len(self.logits) - 1)

    def _token(self, index: int) -> int:
        return self._tokens[index] if index < len(self._tokens) else 0


class MlxSubject:
    """An MLX model for a trial; see `TrialSubject`."""

    def __init__(
        self, model: MlxModel, hold: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """`hold` is held during each pass."""
        self._model = model.model
        self._hold = hold
        self.vocabulary_size = model.vocabulary_size

    def alone(self, row: TrialRow) -> Logits:
        """Return the logits at the row's lengths, from one pass."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream
        from mlx_lm.models.cache import make_prompt_cache

        with self._hold(), computing(), mx.stream(generation_stream):
            logits = self._model(mx.array([row.tokens]), cache=make_prompt_cache(self._model))
            last = logits[0, len(row.prompt) - 1 :].astype(mx.float32)
            return np.array(last)

    def together(self, rows: Sequence[TrialRow], chunk: int) -> list[Logits]:
        """Return the logits of rows that mlx-lm's batch computes together."""
        return self._run([(row, (), None) for row in rows], chunk)[0]

    def reusing(self, row: TrialRow, donor: Sequence[int], shared: int) -> list[Logits]:
        """Return the logits after the donor's caches, cut, or else after those of the same text."""
        from mlx_lm.models.cache import can_trim_prompt_cache

        layers, tokens = self._kept(donor)
        if can_trim_prompt_cache(layers):
            layers = cut(layers, len(tokens), shared)
        else:
            layers, tokens = self._kept(row.prompt[:shared])
            if tokens != list(row.prompt[:shared]):
                return []
        rest = TrialRow(row.prompt[shared:], row.steps)
        return self._run([(rest, row.prompt[:shared], layers)], len(rest.prompt))[0]

    def _kept(self, tokens: Sequence[int]) -> tuple[list[Any], list[int]]:
        """Return caches as they are kept of a finished row, and the tokens that they hold."""
        # The last token is computed as a step.
        row = TrialRow(tuple(tokens[:-1]), (tokens[-1],))
        return self._run([(row, (), None)], len(tokens))[1]

    def _run(
        self, rows: Sequence[tuple[TrialRow, Sequence[int], list[Any] | None]], chunk: int
    ) -> tuple[list[Logits], tuple[list[Any], list[int]]]:
        """Return the logits of (row, tokens before it, their caches), and a single row's caches."""
        batch = MlxBatch(self._model, len(rows), chunk)
        forced = [_Forced(row.steps) for row, _, _ in rows]
        try:
            uids = [
                batch.insert(row.prompt, ENDLESS, choice, before, layers)
                for choice, (row, before, layers) in zip(forced, rows, strict=True)
            ]
            for _ in range(_MOST_PASSES):
                if all(each.is_done for each in forced):
                    break
                with self._hold():
                    batch.next(chunk)
            else:
                raise EngineFailed("mlx-lm's batch does not go on")
            kept = batch.layers(uids[0]) if len(rows) == 1 else ([], [])
        finally:
            batch.close()
        return [np.stack(each.logits) for each in forced], kept


def try_model(
    info: ModelInfo,
    config: Mapping[str, Any],
    load: Callable[[], MlxModel],
    options: EngineOptions,
    *,
    is_dense: bool,
) -> tuple[MlxModel, TrialResult]:
    """Load the model and try it, unless an earlier trial with the same files is known; blocks.

    Raises OtherRuntimeNeeded if its numbers are wrong and another runtime is there; the model is
    not loaded, or closed, then.
    """
    trial = options.trial or TrialOptions()
    against = "another runtime" if trial.reference else "itself"
    length = rounded_length(options.context_tokens or info.context_length)
    settings = f"mlx, dense {is_dense}, against {against}, {length} tokens"
    key = trial_key(info.files, _LIBRARIES, settings)
    known = known_result(key, trial)
    if known is not None:
        _check(known, trial)
    model = load()
    try:
        result = tried(
            info.name, key, trial, lambda: _run_trial(info, config, model, length, trial)
        )
        _check(result, trial)
    except BaseException:
        model.close()
        raise
    return model, result


def _check(result: TrialResult, trial: TrialOptions) -> None:
    is_right = result.is_sound and result.has_cache and result.has_chunks
    if trial.has_alternative and not is_right:
        raise OtherRuntimeNeeded(result.reason)


def _run_trial(
    info: ModelInfo,
    config: Mapping[str, Any],
    model: MlxModel,
    longest: int,
    trial: TrialOptions,
) -> TrialResult:
    terms = TrialTerms(
        _tolerance(model),
        sliding_windows(config),
        affordable_tokens(info.parameters),
        min(longest, _MOST_LOGITS // max(model.vocabulary_size, 1)),
    )
    subject = MlxSubject(model, trial.hold)
    with trial.reference() if trial.reference else nullcontext() as reference:
        return run_trial(subject, terms, reference)


def _tolerance(model: MlxModel) -> float:
    from mlx.utils import tree_flatten

    parameters = tree_flatten(model.model.parameters())
    kinds = {str(array.dtype).removeprefix("mlx.core.") for _, array in parameters}
    if "uint32" in kinds:
        return QUANTIZED_TOLERANCE
    return max((TOLERANCES[kind] for kind in kinds if kind in TOLERANCES), default=0.01)
