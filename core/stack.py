"""Runs a function on a thread with a large stack: for native code that recurses over its input."""

import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

from core.errors import Unavailable

Result = TypeVar("Result")

# `threading.stack_size` is one setting of the whole process.
_starting = threading.Lock()


def call_with_stack(stack_bytes: int, work: Callable[[], Result]) -> Result:
    """Return `work()`, which runs on a new thread with `stack_bytes` of stack; blocks.

    Only the part that is used takes memory.  Raises what `work` raises, also a BaseException, and
    Unavailable if the thread cannot be started.
    """
    results: list[Result] = []
    problems: list[BaseException] = []
    context = contextvars.copy_context()

    def run() -> None:
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
