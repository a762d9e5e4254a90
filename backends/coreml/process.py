"""Runs a Core ML model in a child process of its own, with a limit on each thing it is asked for.

The child may keep its interpreter's lock for minutes, see `backends.coreml.worker`; threads of this
process run on.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import ChildOptions
from backends.coreml.compiled import CompiledPlace, open_place
from backends.coreml.frames import LENGTHS, Arrays, packed, unpacked
from backends.coreml.spec import CoremlSpec, broken
from backends.engine.failures import RuntimeLost
from core.child import AnswerTooLong, Child, ChildEnded, describe_exit, kept_environment
from core.errors import EngineFailed
from core.process_memory import count_model_process, forget_model_process
from core.units import GIB, MIB

# The first start of a program on a Mac is examined by the system.
_START_LIMIT_S = 120.0
# The health check would replace this process with all its models at the whole limit.
_SHARE_OF_LIMIT = 0.9
_EXIT_GRACE_S = 1.0
_ANSWER_LIMIT_BYTES = 2 * GIB
# A copy takes twice a state as float32 for a moment; larger ones are computed again.
_MOST_COPIED_BYTES = 64 * MIB
_STATE_BYTES = {"float16": 2, "float32": 4}

_CODE_FOLDER = Path(__file__).resolve().parents[2]
# The watcher is forked before numpy starts threads.
_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from core.parent import kill_group_with_parent; kill_group_with_parent(int(sys.argv[2])); "
    "from backends.coreml.worker import main; main()"
)
_COMMAND = [sys.executable, "-I", "-c", _WORKER]
# coremltools asks `sw_vers` for the system's version; Core ML keeps files in home and TMPDIR.
_ENVIRONMENT = ("HOME", "LANG", "LOGNAME", "PATH", "TMPDIR", "USER")


class CoremlProcess:
    """Core ML through coremltools in a child; implements `backends.coreml.runtime.Runtime`.

    The end of the child raises RuntimeLost, which ends this model's engine and no other.
    """

    def __init__(self, spec: CoremlSpec, options: ChildOptions) -> None:
        """Start the child, and compile and load the model; the first time blocks for minutes.

        Raises BrokenModel, RuntimeLost.
        """
        self.child_cpu_s = 0.0
        self._step_limit_s = options.step_limit_s * _SHARE_OF_LIMIT
        self._can_copy = _state_bytes(spec) <= _MOST_COPIED_BYTES
        self._numbers = count()
        # Why the child can be asked for nothing more.
        self._end: EngineFailed | None = None
        folder = options.compiled_folder
        self._place: CompiledPlace | None = None if folder is None else open_place(folder, spec)
        try:
            self._child = _start()
        except BaseException:
            self._close_place()
            raise
        count_model_process(self._child.pid)
        try:
            self._reply(_START_LIMIT_S, "to start")
            self._open(spec, options.load_limit_s * _SHARE_OF_LIMIT)
        except BaseException:
            self.close()
            raise

    def _open(self, spec: CoremlSpec, limit_s: float) -> None:
        head = {
            "do": "open",
            "package": str(spec.package),
            "compiled": "" if self._place is None else str(self._place.path),
            "states": list(spec.states),
        }
        try:
            self._ask(head, limit_s=limit_s, what="to load the model; raise load_limit_s")
        except _Refused as problem:
            raise broken(spec.package, f"Core ML cannot load it ({problem})") from problem.__cause__

    def make_state(self) -> int:
        """Return the number of an empty state.  Raises EngineFailed."""
        state = next(self._numbers)
        self._request({"do": "make_state", "state": state})
        return state

    def copy_state(self, state: int) -> int | None:
        """Return the number of a copy; None for large states.  Raises EngineFailed."""
        if not self._can_copy:
            return None
        copy = next(self._numbers)
        self._request({"do": "copy_state", "source": state, "state": copy})
        return copy

    def close_state(self, state: int) -> None:
        """Free a state, unless that has happened with the child's end.  Raises EngineFailed."""
        if self._end is None:
            self._request({"do": "close_state", "state": state})

    def compute(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: int | None,
        output: str,
        rows: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:
        """Run the model once and return one output.  Raises EngineFailed."""
        head = {"do": "compute", "state": state, "output": output, "rows": rows}
        return self._request(head, inputs)["output"]

    def interrupt(self) -> None:
        """Kill the child from any thread; whatever runs then raises EngineFailed."""
        self._end = self._end or EngineFailed("The model was unloaded.")
        self._child.kill()

    def close(self) -> None:
        """Kill the child, which frees its memory; idempotent."""
        self._end = self._end or EngineFailed("The model was unloaded.")
        self._child.close()
        forget_model_process(self._child.pid)
        self._close_place()

    def _close_place(self) -> None:
        if self._place is not None:
            self._place.close()

    def _request(
        self, head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> Arrays:
        try:
            what = "to compute once; raise step_limit_s"
            return self._ask(head, arrays, limit_s=self._step_limit_s, what=what)
        except _Refused as problem:
            raise EngineFailed(f"The Core ML model failed: {str(problem)[:500]}") from problem

    def _ask(
        self,
        head: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]] | None = None,
        *,
        limit_s: float,
        what: str,
    ) -> Arrays:
        if self._end is not None:
            raise self._end
        return self._reply(limit_s, what, packed(head, arrays))

    def _reply(
        self, limit_s: float, what: str, message: Sequence[bytes | memoryview] = ()
    ) -> Arrays:
        """Send a message, if there is one, and return the arrays of the reply; blocks.

        Raises _Refused if the child could not do it, RuntimeLost if it ended or took too long.
        """
        deadline = time.monotonic() + limit_s
        try:
            for piece in message:
                self._child.write(piece, deadline)
            text_bytes, data_bytes = LENGTHS.unpack(self._child.read(LENGTHS.size, deadline))
            text = self._child.read(text_bytes, deadline)
            head, arrays = unpacked(text, self._child.read(data_bytes, deadline))
        except TimeoutError:
            self._child.close()
            reason = f"The model's Core ML process took longer than {limit_s:.0f} s {what}."
            self._end = self._end or RuntimeLost(reason)
            raise self._end from None
        except (ChildEnded, AnswerTooLong) as problem:
            raise self._lost() from problem
        self.child_cpu_s = head["cpu_s"]
        if head.get("error"):
            number = head["errno"]
            cause = None if number is None else OSError(number, head["error"])
            raise _Refused(head["error"]) from cause
        return arrays

    def _lost(self) -> EngineFailed:
        code = self._child.close(0.0 if self._end else _EXIT_GRACE_S)
        if self._end is not None:
            return self._end
        hint = ": probably memory was short" if code == -signal.SIGKILL else ""
        tail = f" ({self._child.stderr_tail})" if self._child.stderr_tail else ""
        self._end = RuntimeLost(f"The model's Core ML process {describe_exit(code)}{hint}{tail}.")
        return self._end


class _Refused(Exception):
    """The child could not do what it was asked for; its cause is the system's error, if any."""


def _start() -> Child:
    try:
        return Child(
            [*_COMMAND, str(_CODE_FOLDER), str(os.getpid())],
            kept_environment(*_ENVIRONMENT),
            answer_limit_bytes=_ANSWER_LIMIT_BYTES,
            keeps_stderr=True,
        )
    except OSError as problem:
        raise RuntimeLost(
            "The process of a Core ML model did not start. Check the server's log and free memory, "
            "then try again."
        ) from problem


def _state_bytes(spec: CoremlSpec) -> int:
    return sum(
        int(np.prod(state.shape, dtype=object)) * _STATE_BYTES.get(state.dtype, 4)
        for state in spec.states.values()
    )
