"""Rows of a Core ML language model with one state each, and the runtimes that run it."""

import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.coreml.layout import Layout, causal_mask, token_inputs
from backends.coreml.mil.interpreter import MilInterpreter
from backends.coreml.spec import CoremlSpec, broken
from backends.engine.row_model import RowInput
from core.errors import BrokenModel, EngineFailed


class Runtime(Protocol):
    """A runtime for a model: Core ML through coremltools, or the reference interpreter."""

    def make_state(self) -> Any:
        """Return an empty state."""
        ...

    def copy_state(self, state: Any) -> Any:
        """Return an independent copy of a state."""
        ...

    def predict(
        self, data: Mapping[str, NDArray[Any]], state: Any = None
    ) -> Mapping[str, NDArray[Any]]:
        """Run the model once; updates `state` in place."""
        ...


class AppleRuntime:
    """Core ML through coremltools; macOS only."""

    def __init__(self, spec: CoremlSpec) -> None:
        """Compile and load the model; blocks, the first time for minutes.  Raises BrokenModel."""
        ct = importlib.import_module("coremltools")
        try:
            self._model = ct.models.MLModel(str(spec.package))
        except Exception as problem:
            raise broken(spec.package, f"Core ML cannot load it ({problem})") from problem
        self._spec = spec

    def make_state(self) -> Any:
        """Return an empty state."""
        return self._model.make_state()

    def copy_state(self, state: Any) -> Any:
        """Return an independent copy of a state."""
        copy = self._model.make_state()
        for name in self._spec.states:
            copy.write_state(name, state.read_state(name))
        return copy

    def predict(
        self, data: Mapping[str, NDArray[Any]], state: Any = None
    ) -> Mapping[str, NDArray[Any]]:
        """Run the model once."""
        result: Mapping[str, NDArray[Any]] = self._model.predict(dict(data), state)
        return result


def open_runtime(spec: CoremlSpec, threads: int) -> Runtime:
    """Load the model on this system's runtime; blocks.  Raises BrokenModel."""
    if sys.platform == "darwin":
        return AppleRuntime(spec)
    return MilInterpreter(spec, threads=threads)


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
        """Take ownership of the runtime and run it once.  Raises BrokenModel if that fails."""
        self.max_rows = max_rows
        self.native_cpu_s = 0.0
        self._runtime: Runtime | None = runtime
        self._layout = layout
        self._rows: dict[int, _Row] = {}
        self._ids = count()
        try:
            row = self.open_row(1)
            self.vocabulary_size = len(self._append(self._rows[row], [0]))
            self.close_row(row)
        except (EngineFailed, BrokenModel) as problem:
            raise broken(spec.package, f"it does not run ({problem.message})") from problem

    def open_row(self, capacity: int) -> int:
        """Return an empty row; its state has the size of the whole context, not of `capacity`."""
        del capacity
        assert self._runtime is not None
        row = next(self._ids)
        self._rows[row] = _Row(self._runtime.make_state() if self._layout.causal else None)
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
            found = self._output(token_inputs(self._layout, text, self._padded(text)), None)
            if len(found) >= len(text):
                held.tokens.extend(row.tokens)
                return np.array(found[known : len(text)])
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
            self.native_cpu_s += time.thread_time() - started

    def _append_step(self, row: _Row, tokens: Sequence[int]) -> NDArray[np.float32]:
        layout, past, new = self._layout, len(row.tokens), len(tokens)
        inputs = token_inputs(layout, tokens, new)
        if layout.padding:
            inputs[layout.padding] = np.ones((1, past + new), np.int32)
        inputs[layout.causal] = causal_mask(past, new)
        if layout.sliding:
            inputs[layout.sliding] = causal_mask(past, new, layout.window)
        return self._logits(inputs, row.state, -1)

    def _read_all(self, row: _Row, tokens: Sequence[int]) -> NDArray[np.float32]:
        text = [*row.tokens, *tokens]
        inputs = token_inputs(self._layout, text, self._padded(text))
        logits = self._logits(inputs, None, len(text) - 1)
        row.tokens.extend(tokens)
        return logits

    def _logits(
        self, inputs: Mapping[str, NDArray[Any]], state: Any, position: int
    ) -> NDArray[np.float32]:
        rows = self._output(inputs, state)
        # Some models give the logits of the last token only.
        return np.array(rows[position if len(rows) > 1 else 0])

    def _output(self, inputs: Mapping[str, NDArray[Any]], state: Any) -> NDArray[np.float32]:
        output = run(self._runtime, inputs, state)[self._layout.output]
        return np.asarray(output, np.float32).reshape(-1, output.shape[-1])

    def _padded(self, text: Sequence[int]) -> int:
        return self._layout.padded_length(len(text))

    def truncate(self, row: int, length: int) -> bool:
        """Keep the first `length` tokens; False for a sliding cache."""
        if self._layout.sliding:
            return False
        del self._rows[row].tokens[length:]
        return True

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Return a new row with the first tokens of another; None for a sliding cache."""
        del capacity
        before = self._rows[source]
        if self._runtime is None or (self._layout.sliding and length != len(before.tokens)):
            return None
        state = self._runtime.copy_state(before.state) if self._layout.causal else None
        row = next(self._ids)
        self._rows[row] = _Row(state, before.tokens[:length])
        return row

    def close_row(self, row: int) -> None:
        """Free a row's state."""
        del self._rows[row]

    def close(self) -> None:
        """Free the model and all rows; twice is fine."""
        self._rows.clear()
        self._runtime = None


def run(
    runtime: Runtime | None, inputs: Mapping[str, NDArray[Any]], state: Any
) -> Mapping[str, NDArray[Any]]:
    """Run the model once.  Raises EngineFailed for any exception of the runtime."""
    if runtime is None:
        raise EngineFailed("The model was unloaded.")
    try:
        return runtime.predict(inputs, state)
    except Exception as problem:
        raise EngineFailed(f"The Core ML model failed: {str(problem)[:500]}") from problem
