"""Tries a `RowModel`, and restricts it to what its trial found right."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from backends.engine.prompt_scores import all_logits
from backends.engine.row_model import PortableRows, RowInput, RowModel
from backends.engine.trial.checks import Logits
from backends.trials import TrialResult, TrialRow


class RowModelSubject:
    """A `RowModel` for a trial; see `TrialSubject`."""

    def __init__(
        self,
        model: RowModel,
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`hold` is held during each pass."""
        self._model = model
        self._hold = hold

    @property
    def vocabulary_size(self) -> int:
        """Number of logits."""
        return self._model.vocabulary_size

    def alone(self, row: TrialRow) -> Logits:
        """Return the logits at each length, of a new row in one pass."""
        return np.stack([self._continued([row.tokens[:length]])[0] for length in row.lengths])

    def _continued(self, pieces: Sequence[Sequence[int]]) -> list[Logits]:
        """Return the logits after each of the pieces of a new row."""
        opened = self._model.open_row(sum(map(len, pieces)))
        try:
            return [self._extend([RowInput(opened, piece)])[0] for piece in pieces]
        finally:
            self._model.close_row(opened)

    def _extend(self, inputs: Sequence[RowInput]) -> Logits:
        with self._hold():
            # Some models give a view that the next pass overwrites.
            return np.array(self._model.extend(inputs))

    def together(self, rows: Sequence[TrialRow], chunk: int) -> list[Logits]:
        """Return the logits of rows in common passes, as `RowStepper` computes them.

        More rows than the model can have open are computed one after the other.
        """
        if len(rows) > self._model.max_rows:
            return [self.together([row], chunk)[0] for row in rows]
        opened: list[int] = []
        try:
            for row in rows:
                opened.append(self._model.open_row(len(row.tokens)))
            return self._step_all(rows, opened, chunk)
        finally:
            for slot in opened:
                self._model.close_row(slot)

    def _step_all(
        self, rows: Sequence[TrialRow], opened: Sequence[int], chunk: int
    ) -> list[Logits]:
        done = [0] * len(rows)
        found: list[list[Logits]] = [[] for _ in rows]
        while True:
            inputs, active = [], []
            for index, row in enumerate(rows):
                left = len(row.prompt) - done[index]
                count = min(left, chunk) if left > 0 else 1
                tokens = row.tokens[done[index] : done[index] + count]
                if tokens:
                    inputs.append(RowInput(opened[index], tokens))
                    active.append(index)
            if not inputs:
                return [np.stack(each) for each in found]
            for index, each, logits in zip(active, inputs, self._extend(inputs), strict=True):
                done[index] += len(each.tokens)
                if done[index] >= len(rows[index].prompt):
                    found[index].append(logits)

    def reusing(self, row: TrialRow, donor: Sequence[int], shared: int) -> list[Logits]:
        """Return the logits after a copy of the donor's row, and after a cut of the row itself."""
        model, found = self._model, []
        pieces = [row.prompt[shared:], *((token,) for token in row.steps)]
        opened = [model.open_row(len(row.tokens))]
        try:
            self._extend([RowInput(opened[0], donor)])
            can_copy = model.max_rows > 1
            copied = model.copy_row(opened[0], shared, len(row.tokens)) if can_copy else None
            if copied is not None:
                opened.append(copied)
                found.append(self._extended(copied, pieces))
            if model.truncate(opened[0], shared):
                found.append(self._extended(opened[0], pieces))
            return found
        finally:
            for slot in opened:
                model.close_row(slot)

    def _extended(self, slot: int, pieces: Sequence[Sequence[int]]) -> Logits:
        return np.stack([self._extend([RowInput(slot, piece)])[0] for piece in pieces])


class LimitedRows:
    """A `RowModel` that does only what its trial found right; also exports no cache then."""

    layout: str | None = None

    def __init__(self, model: RowModel, result: TrialResult) -> None:
        """Take ownership of `model`."""
        self._model = model
        self._has_batches = result.has_batches
        self._has_chunks = result.has_chunks
        self._has_reuse = result.has_reuse and result.has_chunks
        self._lengths: dict[int, int] = {}
        self._portable = model if isinstance(model, PortableRows) else None
        if self._has_reuse and self._portable is not None:
            self.layout = self._portable.layout
        self.max_rows = model.max_rows
        self.vocabulary_size = model.vocabulary_size

    @property
    def native_cpu_s(self) -> float:
        """CPU seconds that the runtime has used so far."""
        return self._model.native_cpu_s

    def open_row(self, capacity: int) -> int:
        """Return an empty row."""
        row = self._model.open_row(capacity)
        self._lengths[row] = 0
        return row

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens; see `RowModel.extend`.

        Rows are computed one after the other unless batches are right; tokens after the first
        piece of a prompt one by one unless chunks are.
        """
        if self._has_batches and (self._has_chunks or not any(map(self._is_chunk, rows))):
            logits = self._model.extend(rows)
        else:
            logits = np.stack([self._extend_alone(each) for each in rows])
        for each in rows:
            self._lengths[each.row] += len(each.tokens)
        return logits

    def _is_chunk(self, each: RowInput) -> bool:
        return len(each.tokens) > 1 and self._lengths[each.row] > 0

    def _extend_alone(self, each: RowInput) -> NDArray[np.float32]:
        pieces = [each.tokens]
        if self._is_chunk(each) and not self._has_chunks:
            pieces = [(token,) for token in each.tokens]
        for piece in pieces:
            logits = np.array(self._model.extend([RowInput(each.row, piece)])[0])
        return logits

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        """Append tokens; see `GivesAllLogits`.  One by one where chunks are not right."""
        if self._is_chunk(row) and not self._has_chunks:
            pieces = [RowInput(row.row, (token,)) for token in row.tokens]
            logits = np.concatenate([all_logits(self._model, piece) for piece in pieces])
        else:
            logits = all_logits(self._model, row)
        self._lengths[row.row] += len(row.tokens)
        return logits

    def truncate(self, row: int, length: int) -> bool:
        """Cut a row; False unless that was found right."""
        if length >= self._lengths[row]:
            return True
        if not self._has_reuse or not self._model.truncate(row, length):
            return False
        self._lengths[row] = length
        return True

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Copy a row; None unless that was found right."""
        row = self._model.copy_row(source, length, capacity) if self._has_reuse else None
        if row is not None:
            self._lengths[row] = length
        return row

    def read_tokens(self, row: int, start: int, count: int) -> NDArray[np.uint8]:
        """See `PortableRows`; called only if `layout` is set."""
        assert self._portable is not None
        return self._portable.read_tokens(row, start, count)

    def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
        """See `PortableRows`; called only if `layout` is set."""
        assert self._portable is not None
        if not self._portable.append_tokens(row, count, state):
            return False
        self._lengths[row] += count
        return True

    def close_row(self, row: int) -> None:
        """Free a row's cache."""
        self._lengths.pop(row, None)
        self._model.close_row(row)

    def close(self) -> None:
        """Free everything; idempotent."""
        self._lengths.clear()
        self._model.close()


def limited(model: RowModel, result: TrialResult) -> RowModel:
    """Return `model`, restricted if the trial found something wrong."""
    if result.has_batches and result.has_chunks and result.has_reuse:
        return model
    return LimitedRows(model, result)
