"""Tries a GGUF model in its context, before the stepper uses that."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineOptions, ModelInfo
from backends.engine.row_model import RowInput
from backends.engine.trial.checks import (
    QUANTIZED_TOLERANCE,
    Logits,
    TrialTerms,
    rounded_length,
    run_trial,
)
from backends.engine.trial.results import trial_key, tried
from backends.engine.trial.row_models import RowModelSubject
from backends.gguf.batch import Batch
from backends.gguf.model import GgufModel, library, native_log
from backends.trials import TrialOptions, TrialResult, TrialRow
from core.errors import BrokenModel, EngineFailed

_LIBRARIES = ("llama-cpp-python",)
# Activations and the KV cache are rounded to 16 bits for weights of any float type.
_LEAST_TOLERANCE = 0.1
_FLOAT_CACHES = (None, "f32", "f16", "bf16")
# Cells for two rows and a copy.
_ROWS = 3


class ContextRows:
    """The sequence ids of a context as rows; implements what a trial needs of a `RowModel`."""

    native_cpu_s = 0.0

    def __init__(self, model: GgufModel, context: Any, batch: Batch, max_rows: int) -> None:
        """Use an empty context; it is empty again once all rows are closed."""
        self._llama = library()
        self._context = context
        self._memory = self._llama.llama_get_memory(context)
        self._batch = batch
        self._whole_beyond = model.whole_beyond
        self._lengths: dict[int, int] = {}
        self.max_rows = max_rows
        self.vocabulary_size = model.vocabulary_size

    def open_row(self, capacity: int) -> int:
        """Return an empty sequence id."""
        del capacity
        row = next(each for each in range(self.max_rows) if each not in self._lengths)
        self._lengths[row] = 0
        return row

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens to the rows in one batch; see `RowModel`.  Raises EngineFailed."""
        return self.compute([(each.row, [each.tokens]) for each in rows])

    def compute(self, rows: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> NDArray[np.float32]:
        """Append pieces of text to rows; return the logits after each piece, in order.

        A first piece that is longer than a batch is computed before the others.
        """
        self._batch.clear()
        outputs = []
        for row, pieces in rows:
            for piece in pieces:
                outputs.append(self._add(row, piece))
        self._decode()
        found = [self._llama.llama_get_logits_ith(self._context, index) for index in outputs]
        size = (self.vocabulary_size,)
        return np.stack([np.ctypeslib.as_array(each, size).copy() for each in found])

    def _add(self, row: int, piece: Sequence[int]) -> int:
        most = self._batch.capacity // 2
        while len(piece) > most:
            self._batch.add(row, self._lengths[row], piece[:most], logits=True)
            self._lengths[row] += most
            piece = piece[most:]
            self._decode()
            self._batch.clear()
        index = self._batch.add(row, self._lengths[row], piece, logits=True)
        self._lengths[row] += len(piece)
        return index

    def _decode(self) -> None:
        code = self._llama.llama_decode(self._context, self._batch.native)
        if code:
            reason = native_log.take_own_errors() or "no reason given"
            raise EngineFailed(f"llama_decode returned {code}: {reason}")

    def truncate(self, row: int, length: int) -> bool:
        """Cut a row as the engine does: not beyond a sliding window, nor a recurrent state."""
        if self._lengths[row] > self._whole_beyond:
            return False
        is_cut = bool(self._llama.llama_memory_seq_rm(self._memory, row, length, -1))
        self._lengths[row] = length if is_cut else self._lengths[row]
        return is_cut

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Share the first cells of a row with a new one; None where the engine does not."""
        if self._lengths[source] > self._whole_beyond or len(self._lengths) >= self.max_rows:
            return None
        row = self.open_row(capacity)
        self._llama.llama_memory_seq_cp(self._memory, source, row, 0, length)
        self._lengths[row] = length
        return row

    def close_row(self, row: int) -> None:
        """Free a row's cells."""
        self._lengths.pop(row, None)
        self._llama.llama_memory_seq_rm(self._memory, row, -1, -1)

    def close(self) -> None:
        """Empty the context."""
        self._lengths.clear()
        self._llama.llama_memory_clear(self._memory, False)


class _ContextSubject(RowModelSubject):
    """A context for a trial, which computes the logits of several tokens in one pass."""

    def __init__(self, rows: ContextRows, hold: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(rows, hold)
        self._rows = rows

    def alone(self, row: TrialRow) -> Logits:
        """Return the logits at each length of a row, from one pass."""
        opened = self._rows.open_row(len(row.tokens))
        try:
            with self._hold():
                pieces = [row.prompt, *((token,) for token in row.steps)]
                return self._rows.compute([(opened, pieces)])
        finally:
            self._rows.close_row(opened)


def try_context(
    info: ModelInfo, model: GgufModel, context: Any, batch: Batch, options: EngineOptions
) -> TrialResult:
    """Return what of the model is right in an empty context, which is empty again then; blocks.

    Raises BrokenModel if llama.cpp cannot compute a row at all.
    """
    assert options.kv_tokens is not None
    trial = options.trial or TrialOptions()
    rows = ContextRows(model, context, batch, min(options.max_sequences, _ROWS))
    terms = _terms(info, model, options)

    def run() -> TrialResult:
        try:
            return run_trial(_ContextSubject(rows, trial.hold), terms)
        finally:
            rows.close()

    settings = f"{terms}, {options.kv_type}, {options.max_sequences > 1}"
    result = tried(info.name, trial_key(info.files, _LIBRARIES, settings), trial, run)
    if not result.is_sound:
        raise BrokenModel(
            f"The model {info.name} does not run on llama.cpp: {result.reason}. Use another "
            "quantization of it.",
            param="model",
        )
    return result


def _terms(info: ModelInfo, model: GgufModel, options: EngineOptions) -> TrialTerms:
    assert options.kv_tokens is not None
    terms = TrialTerms.of(info, {}, options.context_tokens)
    has_float_cache = options.kv_type in _FLOAT_CACHES
    window = model.whole_beyond
    return replace(
        terms,
        tolerance=max(terms.tolerance, _LEAST_TOLERANCE)
        if has_float_cache
        else QUANTIZED_TOLERANCE,
        windows=(window,) if 0 < window < info.context_length else (),
        most_length=min(terms.most_length, rounded_length(options.kv_tokens // _ROWS)),
    )
