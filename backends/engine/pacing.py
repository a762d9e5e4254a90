"""Applies limits to an engine, and measures the seconds that requests lose to them."""

import math
import threading
import time

from backends.limits import UNLIMITED, EngineLimits


class Pacer:
    """The limits of one engine and their cost.

    Any thread may replace `limits`; everything else belongs to the engine's thread.  `paused_s`
    is the time spent in pauses between steps so far.
    """

    def __init__(self) -> None:
        self.limits = UNLIMITED
        self.paused_s = 0.0
        self._applied: EngineLimits = UNLIMITED
        self._stepped_at = -math.inf
        self._limited_s = 0.0
        self._limited_since: float | None = None

    def apply_to(self, stepper: object) -> None:
        """Apply the limits to the stepper if they changed."""
        before, self._applied = self._applied, self.limits
        if before != self._applied:
            self._applied.apply_to(stepper)

    @property
    def is_applied(self) -> bool:
        """Whether the limits were applied since they were set."""
        return self._applied is self.limits

    def pause_left_s(self) -> float:
        """Return the seconds until the next step may start; 0 if it may start now."""
        return self.limits.pause_left_s(self._stepped_at, time.monotonic())

    def rest(self, wake: threading.Condition, rest_s: float | None) -> None:
        """Wait for `wake`, whose lock is held; with `rest_s` the wait counts as a pause."""
        if rest_s is None:
            wake.wait()
            return
        began_at = time.monotonic()
        wake.wait(rest_s)
        self.paused_s += time.monotonic() - began_at

    def note_step(self) -> None:
        """Start the pause after a step."""
        self._stepped_at = time.monotonic()

    def set_limited(self, is_limited: bool) -> None:
        """Start or stop the clock of requests that wait only because of the limits."""
        if is_limited != (self._limited_since is not None):
            self._limited_s = self.limited_s()
            self._limited_since = time.monotonic() if is_limited else None

    def limited_s(self) -> float:
        """Return the seconds that requests have waited because of the limits so far."""
        if self._limited_since is None:
            return self._limited_s
        return self._limited_s + time.monotonic() - self._limited_since
