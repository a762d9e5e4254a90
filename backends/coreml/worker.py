"""Child process that loads one Core ML model and computes with it; its parent may kill it.

coremltools keeps the interpreter's lock while it compiles and predicts, so nothing else can run in
the process.  Source: coremltools 9.0, CoreMLPython.mm has no `gil_scoped_release`.

Protocol: messages of `backends.coreml.frames` on stdin and stdout, one reply each, the first
without a request once coremltools is imported.  Replies have the CPU seconds of the process as
`cpu_s`, and `error` with `errno` if the request failed.  The process exits at the end of stdin.
"""

import contextlib
import ctypes
import importlib
import sys
import time
from collections.abc import Iterator
from io import TextIOWrapper
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from backends.coreml.compile import open_model
from backends.coreml.frames import LENGTHS, Arrays, packed, selected, unpacked
from core.child import take_stdout
from core.files import passing_cause

_OBJC = "/usr/lib/libobjc.A.dylib"
_LONGEST_ERROR = 1000
_CONVERTED_FROM = ("scipy", "sklearn", "tensorflow", "torch", "transformers", "xgboost")


class Worker:
    """The model and its states, by the numbers that the parent gave them."""

    def __init__(self, coremltools: Any) -> None:
        self._coremltools = coremltools
        self._model: Any = None
        self._names: list[str] = []
        self._states: dict[int, Any] = {}

    def answer(self, head: dict[str, Any], arrays: Arrays) -> Arrays:
        """Do what a message asks for; raises what coremltools raises."""
        match head["do"]:
            case "open":
                self._names = head["states"]
                self._model = open_model(self._coremltools, head["package"], head["compiled"])
            case "make_state":
                self._states[head["state"]] = self._model.make_state()
            case "copy_state":
                self._copy_state(self._states[head["source"]], head["state"])
            case "close_state":
                del self._states[head["state"]]
            case "compute":
                return {"output": self._compute(head, arrays)}
        return {}

    def _copy_state(self, source: Any, number: int) -> None:
        copy = self._model.make_state()
        for name in self._names:
            copy.write_state(name, source.read_state(name))
        self._states[number] = copy

    def _compute(self, head: dict[str, Any], arrays: Arrays) -> NDArray[np.float32]:
        state = None if head["state"] is None else self._states[head["state"]]
        # It replaces inputs in the dictionary, and gets arrays that it could write to.
        inputs = {name: array.copy() for name, array in arrays.items()}
        output, rows = self._model.predict(inputs, state)[head["output"]], head["rows"]
        return selected(output, None if rows is None else (rows[0], rows[1]))


def main() -> None:
    """Answer the parent until stdin ends."""
    stream = take_stdout()
    assert isinstance(stream, TextIOWrapper)
    target = stream.buffer
    # coremltools imports them if it can, for conversions: four times the memory.
    for name in _CONVERTED_FROM:
        sys.modules[name] = None  # type: ignore[assignment]
    worker = Worker(importlib.import_module("coremltools"))
    _send(target, {})
    while (message := _receive(sys.stdin.buffer)) is not None:
        try:
            with autorelease_pool():
                reply, arrays = {}, worker.answer(*message)
        except Exception as problem:
            reply, arrays = _error(problem), {}
        _send(target, reply, arrays)


def _error(problem: Exception) -> dict[str, Any]:
    cause = passing_cause(problem)
    return {
        "error": (str(problem) or type(problem).__name__)[:_LONGEST_ERROR],
        "errno": None if cause is None else cause.errno,
    }


def _send(target: IO[bytes], reply: dict[str, Any], arrays: Arrays | None = None) -> None:
    target.writelines(packed({**reply, "cpu_s": time.process_time()}, arrays))
    target.flush()


def _receive(source: IO[bytes]) -> tuple[dict[str, Any], Arrays] | None:
    lengths = source.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    text_bytes, data_bytes = LENGTHS.unpack(lengths)
    return unpacked(source.read(text_bytes), source.read(data_bytes))


@contextlib.contextmanager
def autorelease_pool() -> Iterator[None]:
    """Free what Core ML releases later; on macOS.

    coremltools reads states without a pool, which keeps each copy until the thread ends.
    Source: Clang's Objective-C ARC specification, objc_autoreleasePoolPush.
    """
    if sys.platform != "darwin":
        yield
        return
    library = ctypes.CDLL(_OBJC)
    push, pop = library.objc_autoreleasePoolPush, library.objc_autoreleasePoolPop
    push.restype, pop.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    pool = push()
    try:
        yield
    finally:
        pop(pool)
