"""Runs a function on a thread with a large stack: for native code that recurses over its input."""

import contextlib
import contextvars
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from core.errors import Unavailable

Result = TypeVar("Result")

_QOS_CLASS_UTILITY = 0x11
_NICE = 10
# `threading.stack_size` is one setting of the whole process.
_starting = threading.Lock()


def call_with_stack(
    stack_bytes: int, work: Callable[[], Result], *, is_background: bool = False
) -> Result:
    """Return `work()`, which runs on a new thread with `stack_bytes` of stack; blocks.

    Only the part that is used takes memory.  `is_background` lets threads that compute answers go
    first.  Raises what `work` raises, also a BaseException, and
    Unavailable if the thread cannot be started.
    """
    results: list[Result] = []
    problems: list[BaseException] = []
    context = contextvars.copy_context()

    def run() -> None:
        if is_background:
            _lower_priority()
        try:
            results.append(context.run(work))
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run, name="impetus-stack", daemon=True)
    with _starting:
        usual = threading.stack_size(stack_bytes)
        try:
            thread.start()
        except RuntimeError as error:
            raise Unavailable(
                "The machine has no memory or threads left to prepare the request. Try again later."
            ) from error
        finally:
            threading.stack_size(usual)
    thread.join()
    if problems:
        raise problems[0]
    return results[0]


def _lower_priority() -> None:
    """Lower the calling thread's priority for good; does nothing where that is not possible."""
    with contextlib.suppress(OSError, AttributeError):
        if sys.platform == "darwin":
            # Source: pthread_set_qos_class_self_np(3).
            ctypes.CDLL(None).pthread_set_qos_class_self_np(_QOS_CLASS_UTILITY, 0)
        elif sys.platform == "linux":
            # Linux takes the id of a thread here, setpriority(2).
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
