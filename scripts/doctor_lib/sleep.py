"""Step `server` with --sleep: lets the machine sleep during streams and tells what came after."""

from __future__ import annotations

import time
from collections.abc import Callable

from scripts.doctor_lib.client import AnswerProblem, Client

_LIMIT_S = 600.0
# Shorter differences of the clocks are corrections of the time.
_LEAST_SLEEP_S = 20.0
_ASKED = "Now close the lid for two minutes, then open it again. Waiting for at most ten minutes."


class SleepWatch:
    """Notices sleep: the wall clock goes on and the monotonic one does not, or a stream's gap."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        awake: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall = wall
        self._awake = awake
        self._last = (wall(), awake())
        self.slept_s = 0.0

    def look(self) -> None:
        """Add what was slept since the last look."""
        now = (self._wall(), self._awake())
        gap_s = (now[0] - self._last[0]) - (now[1] - self._last[1])
        if gap_s >= _LEAST_SLEEP_S:
            self.slept_s += gap_s
        self._last = now


def sleep_during_streams(
    client: Client,
    model: str,
    say: Callable[[str], None],
    watch: SleepWatch,
    limit_s: float = _LIMIT_S,
) -> str:
    """Stream until the machine has slept once; return how long it slept.

    Blocks for up to `limit_s` seconds awake and the rest of a stream.  Raises AnswerProblem if the
    stream in which it slept does not come to its end, or if it does not sleep.
    """
    say(_ASKED)
    began = time.monotonic()
    while not watch.slept_s and time.monotonic() - began < limit_s:
        try:
            client.stream(model, watch.look)
        except AnswerProblem as problem:
            watch.look()
            if not watch.slept_s:
                raise
            raise AnswerProblem(f"After {watch.slept_s:.0f} s of sleep: {problem}") from None
        watch.look()
    if not watch.slept_s:
        raise AnswerProblem(f"The machine did not sleep within {limit_s:.0f} s.")
    client.chat(model)
    return f"slept {watch.slept_s:.0f} s, the stream went on to its end"
