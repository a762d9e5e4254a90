"""Rows of a Core ML language model with one state each."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.coreml.layout import Layout, causal_mask, token_inputs
from backends.coreml.runtime import Runtime
from backends.coreml.spec import CoremlSpec, broken
from backends.engine.failures import RuntimeLost
from backends.engine.row_model import RowInput
from core.errors import EngineFailed, ImpetusError


@dataclass(slots=True)
class _Row:
    state: Any = None
    tokens: list[int] = field(default_factory=list)


class CoremlRows:
    """One state per row; implements `backends.engine.row_model.RowModel`.

    The width of the causal mask decides where new tokens are written in the cache, so a row is
    truncated by a narrower mask; a sliding cache may be a ring, so those rows are not truncated.
    """

    def __init__(self, runtime: Runtime, spec: CoremlSpec, layout: Layout, max_rows: int) -> None:
        """Take ownership of the runtime and run it once.

        Raises BrokenModel if that fails, RuntimeLost.
        """
        self.max_rows = max_rows
        self._own_cpu_s = 0.0
        self._child_cpu_s = 0.0
        self._runtime: Runtime | None = runtime
        self._layout = layout
        self._rows: dict[int, _Row] = {}
        self._ids = count()
        try:
            row = self.open_row(1)
            self.vocabulary_size = len(self._append(self._rows[row], [0]))
            self.close_row(row)
        except BaseException as problem:
            runtime.close()
            if isinstance(problem, RuntimeLost) or not isinstance(problem, ImpetusError):
                raise
            raise broken(spec.package, f"it does not run ({problem.message})") from problem

    @property
    def native_cpu_s(self) -> float:
        """CPU seconds that the runtime has used so far, in this process and its child."""
        if self._runtime is not None:
            self._child_cpu_s = self._runtime.child_cpu_s
        return self._own_cpu_s + self._child_cpu_s

    def open_row(self, capacity: int) -> int:
        """Return an empty row; its state has the size of the whole context, not of `capacity`."""
        del capacity
        state = self._open.make_state() if self._layout.causal else None
        row = next(self._ids)
        self._rows[row] = _Row(state)
        return row

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens row by row; return logits (len(rows), vocabulary).

        Raises EngineFailed.
        """
        return np.stack([self._append(self._rows[row.row], row.tokens) for row in rows])

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        """Append tokens to a row; return the logits after each.  Raises EngineFailed.

        Models with a state compute token by token: many give the logits of the last one only.
        """
        held = self._rows[row.row]
        if not self._layout.causal:
            text, known = [*held.tokens, *row.tokens], len(held.tokens)
            inputs = token_inputs(self._layout, text, self._padded(text))
            found = self._output(inputs, None, (known, len(text)))
            if len(found) == len(row.tokens):
                held.tokens.extend(row.tokens)
                return np.array(found)
        return np.stack([self._append(held, [token]) for token in row.tokens])

    def _append(self, row: _Row, tokens: Sequence[int]) -> NDArray[np.float32]:
        started = time.thread_time()
        known = len(row.tokens)
        try:
            if not self._layout.causal:
                return self._read_all(row, tokens)
            done = 0
            while done < len(tokens):
                step = tokens[done : done + self._layout.step_length(len(tokens) - done)]
                logits = self._append_step(row, step)
                row.tokens.extend(step)
                done += len(step)
            return logits
        except BaseException:
            del row.tokens[known:]
            raise
        finally:
            self._own_cpu_s += time.thread_time() - started

    def _append_step(self, row: _Row, tokens: Sequence[int]) -> NDArray[np.float32]:
        layout, past, new = self._layout, len(row.tokens), len(tokens)
        inputs = token_inputs(layout, tokens, new)
        if layout.padding:
            inputs[layout.padding] = np.ones((1, past + new), np.int32)
        inputs[layout.causal] = causal_mask(past, new)
        if layout.sliding:
            inputs[layout.sliding] = causal_mask(past, new, layout.window)
        return self._output(inputs, row.state, (new - 1, new)).reshape(-1)

    def _read_all(self, row: _Row, tokens: Sequence[int]) -> NDArray[np.float32]:
        text = [*row.tokens, *tokens]
        inputs = token_inputs(self._layout, text, self._padded(text))
        logits = self._output(inputs, None, (len(text) - 1, len(text))).reshape(-1)
        row.tokens.extend(tokens)
        return logits

    def _output(
        self, inputs: Mapping[str, NDArray[Any]], state: Any, rows: tuple[int, int]
    ) -> NDArray[np.float32]:
        return self._open.compute(inputs, state, self._layout.output, rows)

    @property
    def _open(self) -> Runtime:
        if self._runtime is None:
            raise EngineFailed("The model was unloaded.")
        return self._runtime

    def _padded(self, text: Sequence[int]) -> int:
        return self._layout.padded_length(len(text))

    def truncate(self, row: int, length: int) -> bool:
        """Keep the first `length` tokens; False for a sliding cache."""
        if self._layout.sliding:
            return False
        del self._rows[row].tokens[length:]
        return True

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Return a new row with the first tokens of another.

        None for a sliding cache, and for states that the runtime does not copy.
        """
        del capacity
        before = self._rows[source]
        if self._runtime is None or (self._layout.sliding and length != len(before.tokens)):
            return None
        state = self._runtime.copy_state(before.state) if self._layout.causal else None
        if state is None and self._layout.causal:
            return None
        row = next(self._ids)
        self._rows[row] = _Row(state, before.tokens[:length])
        return row

    def close_row(self, row: int) -> None:
        """Free a row's state."""
        held = self._rows.pop(row)
        if self._layout.causal and self._runtime is not None:
            self._runtime.close_state(held.state)

    def close(self) -> None:
        """Free the model and all rows; twice is fine."""
        self._rows.clear()
        if self._runtime is not None:
            # What it used until now stays counted.
            self._child_cpu_s = self._runtime.child_cpu_s
            self._runtime.close()
        self._runtime = None
