"""Speed, remaining time and stalls of a download, from the bytes of the last 30 seconds; pure."""

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 30.0
STALLED_S = 10.0


@dataclass(slots=True)
class SpeedWindow:
    """Remembers how many bytes had arrived when; times are monotonic, in seconds.

    `started_s` is when the download began or went on; waiting counts, so that the speed of one
    that stalls falls to 0.
    """

    total_bytes: int
    started_s: float
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, done_bytes: int, now: float) -> None:
        """Note that `done_bytes` of all bytes are there."""
        if not self._samples or done_bytes != self._samples[-1][1]:
            self._samples.append((now, done_bytes))
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()

    def speed(self, now: float) -> float:
        """Return the bytes in a second over the last 30 s; 0 once nothing arrived for 10 s."""
        if not self._samples or self.stalled_s(now) >= STALLED_S:
            return 0.0
        start = max(now - WINDOW_S, self.started_s)
        before = [done for when, done in self._samples if when <= start]
        first = before[-1] if before else self._samples[0][1]
        begun = start if before else max(start, self._samples[0][0])
        return max(self._samples[-1][1] - first, 0) / max(now - begun, 1e-3)

    def stalled_s(self, now: float) -> float:
        """Return for how many seconds no byte has arrived."""
        last = self._samples[-1][0] if self._samples else self.started_s
        return max(now - last, 0.0)

    def remaining_s(self, now: float) -> float | None:
        """Return the seconds that the rest will take, None while nothing arrives."""
        speed = self.speed(now)
        done = self._samples[-1][1] if self._samples else 0
        return max(self.total_bytes - done, 0) / speed if speed else None
