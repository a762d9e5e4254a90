"""How limits slow an engine down, and the seconds that its requests lose to them."""

import math
import threading
import time

from backends.limits import UNLIMITED, EngineLimits


class Pacer:
    """The limits of one engine and what they cost.

    `limits` may be replaced by any thread, everything else belongs to the engine's.  `paused_s`
    are the seconds spent in pauses between steps so far.
    """

    def __init__(self) -> None:
        self.limits = UNLIMITED
        self.paused_s = 0.0
        self._applied: EngineLimits = UNLIMITED
        self._stepped_at = -math.inf
        self._held_s = 0.0
        self._held_since: float | None = None

    def apply_to(self, stepper: object) -> None:
        """Tell the stepper of limits that are new."""
        if self._applied != self.limits:
            self._applied = self.limits
            self._applied.apply_to(stepper)

    def pause_left_s(self) -> float:
        """Return the seconds until the next step may start; 0 when it may at once."""
        return self.limits.pause_left_s(self._stepped_at, time.monotonic())

    def rest(self, wake: threading.Condition, rest_s: float | None) -> None:
        """Wait for `wake`, which is held; what a pause takes of it is counted."""
        if rest_s is None:
            wake.wait()
            return
        began_at = time.monotonic()
        wake.wait(rest_s)
        self.paused_s += time.monotonic() - began_at

    def note_step(self) -> None:
        """Let the next pause begin."""
        self._stepped_at = time.monotonic()

    def note_held(self, is_held: bool) -> None:
        """Count from now on whether requests wait only because fewer may run than could."""
        if is_held != (self._held_since is not None):
            self._held_s = self.held_s()
            self._held_since = time.monotonic() if is_held else None

    def held_s(self) -> float:
        """Return the seconds for which requests have been held back so far."""
        if self._held_since is None:
            return self._held_s
        return self._held_s + time.monotonic() - self._held_since
