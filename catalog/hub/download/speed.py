"""Speed, remaining time and stalls of a download, from the bytes of the last 30 seconds; pure."""

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 30.0
STALLED_S = 10.0


@dataclass(slots=True)
class SpeedWindow:
    """Remembers how many bytes had arrived when; times are monotonic, in seconds.

    `started_s` is when the download began or went on; waiting counts, so that the speed of one
    that stalls falls to 0.  What was on the disk already has no speed.
    """

    total_bytes: int
    started_s: float
    _samples: deque[tuple[float, int]] = field(default_factory=deque)
    _done_bytes: int = 0
    _changed_s: float | None = None

    def add(self, done_bytes: int, now: float, found_bytes: int = 0) -> None:
        """Note that `done_bytes` of all bytes are there, `found_bytes` of them not by the network.

        `found_bytes` is negative after bytes that had arrived were thrown away.
        """
        if done_bytes != self._done_bytes:
            self._done_bytes, self._changed_s = done_bytes, now
        fetched = done_bytes - found_bytes
        if not fetched:
            # The time before the first byte, in which files are read that are there, is no sample.
            self._samples.clear()
        if not self._samples or fetched != self._samples[-1][1]:
            self._samples.append((now, fetched))
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()

    def speed(self, now: float) -> float:
        """Return the bytes in a second over the last 30 s; 0 once nothing arrived for 10 s."""
        if not self._samples or now - self._samples[-1][0] >= STALLED_S:
            return 0.0
        start = max(now - WINDOW_S, self.started_s)
        before = [done for when, done in self._samples if when <= start]
        first = before[-1] if before else self._samples[0][1]
        begun = start if before else max(start, self._samples[0][0])
        return max(self._samples[-1][1] - first, 0) / max(now - begun, 1e-3)

    def stalled_s(self, now: float) -> float:
        """Return for how many seconds no byte has arrived."""
        last = self.started_s if self._changed_s is None else self._changed_s
        return max(now - last, 0.0)

    def remaining_s(self, now: float) -> float | None:
        """Return the seconds that the rest will take, None while nothing arrives."""
        speed = self.speed(now)
        return max(self.total_bytes - self._done_bytes, 0) / speed if speed else None
