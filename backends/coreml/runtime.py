"""The runtimes of Core ML models: Core ML in a process of its own, or the reference interpreter."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.base import ChildOptions
from backends.coreml.frames import selected
from backends.coreml.mil.interpreter import MilInterpreter
from backends.coreml.process import CoremlProcess
from backends.coreml.spec import CoremlSpec
from core.errors import EngineFailed, ImpetusError


class Runtime(Protocol):
    """Runs one model; used from one thread, except `interrupt`."""

    @property
    def child_cpu_s(self) -> float:
        """CPU seconds that were used in another process so far."""
        ...

    def make_state(self) -> Any:
        """Return an empty state."""
        ...

    def copy_state(self, state: Any) -> Any | None:
        """Return an independent copy of a state; None if it is too large to copy."""
        ...

    def close_state(self, state: Any) -> None:
        """Free a state."""
        ...

    def compute(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: Any,
        output: str,
        rows: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:
        """Run the model once and return one output, which may be read-only; updates `state`.

        With `rows` (start, end) only those rows of its last axis, or the one that there is.
        """
        ...

    def interrupt(self) -> None:
        """Let a running `compute` raise, if that is possible; from any thread."""
        ...

    def close(self) -> None:
        """Free the model and its states; idempotent."""
        ...


class ReferenceRuntime:
    """The interpreter, in this process; PyTorch lets other threads run meanwhile."""

    child_cpu_s = 0.0

    def __init__(self, spec: CoremlSpec, threads: int) -> None:
        """Load all weights; blocks.  Raises BrokenModel."""
        self._model: MilInterpreter | None = MilInterpreter(spec, threads=threads)

    def make_state(self) -> Any:
        """Return an empty state."""
        return self._open.make_state()

    def copy_state(self, state: Any) -> Any:
        """Return an independent copy of a state."""
        return self._open.copy_state(state)

    def close_state(self, state: Any) -> None:
        """Free a state."""
        state.clear()

    def compute(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: Any,
        output: str,
        rows: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:
        """Run the model once and return one output.  Raises EngineFailed."""
        try:
            return selected(self._open.predict(inputs, state)[output], rows)
        except ImpetusError:
            raise
        except Exception as problem:
            raise EngineFailed(f"The Core ML model failed: {str(problem)[:500]}") from problem

    def interrupt(self) -> None:
        """Do nothing: a computation in this process cannot be ended."""

    def close(self) -> None:
        """Free the weights."""
        self._model = None

    @property
    def _open(self) -> MilInterpreter:
        if self._model is None:
            raise EngineFailed("The model was unloaded.")
        return self._model


def open_runtime(spec: CoremlSpec, threads: int, child: ChildOptions | None = None) -> Runtime:
    """Load the model on this system's runtime; blocks.  Raises BrokenModel, EngineFailed."""
    if sys.platform == "darwin":
        return CoremlProcess(spec, child or ChildOptions())
    return ReferenceRuntime(spec, threads)
