"""Detects hung work: measures how long an engine's activities have lasted."""

import math
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class StepWatch:
    """Measures how long the oldest of an engine's running activities has lasted.

    An activity is a step, a chore, the preparation of a request, an embedding batch: anything
    that must end by itself.  Several may run at once on several threads.  Thread-safe without a
    lock: each operation is one operation of a dict.
    """

    def __init__(self) -> None:
        self._began_at: dict[Hashable, float] = {}

    def begin(self, activity: Hashable = "step") -> None:
        """Start measuring an activity, or start again if it is already measured."""
        self._began_at[activity] = time.monotonic()

    def end(self, activity: Hashable = "step") -> None:
        """Stop measuring an activity; does nothing if it is not measured."""
        self._began_at.pop(activity, None)

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Measure the activity inside the context; others of this name may run at the same time."""
        activity = (name, object())
        self.begin(activity)
        token = _running.set((self, activity))
        try:
            yield
        finally:
            _running.reset(token)
            self.end(activity)

    @property
    def lasted_s(self) -> float:
        """Seconds that the oldest activity has lasted; 0.0 if none is running."""
        # The copy is made in one operation: other threads change the dict meanwhile.
        began_at = min(self._began_at.copy().values(), default=math.inf)
        return max(0.0, time.monotonic() - began_at)


_running: ContextVar[tuple[StepWatch, Hashable] | None] = ContextVar("activity", default=None)


@contextmanager
def unwatched() -> Iterator[None]:
    """Do not measure the caller's running activity inside the context.

    For waiting until others, which are measured themselves, are done.  Afterwards it is measured
    from zero.
    """
    found = _running.get()
    if found is None:
        yield
        return
    watch, activity = found
    watch.end(activity)
    try:
        yield
    finally:
        watch.begin(activity)
