"""What a running engine may do for now: changed while it runs, without restarting anything."""

import math
import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from core.errors import Unavailable

_RETRY_AFTER_S = 30


@runtime_checkable
class PrefillLimited(Protocol):
    """A stepper whose prompt chunks can be made smaller while it runs."""

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        """Compute at most `chunk_tokens` prompt tokens a step; None: as many as when opened."""
        ...


@runtime_checkable
class Limitable(Protocol):
    """An engine that obeys limits."""

    def set_limits(self, limits: "EngineLimits") -> None:
        """Obey `limits` from the next step on.  Thread-safe; never blocks on a step."""
        ...


@runtime_checkable
class Watched(Protocol):
    """An engine that tells how long its current step has lasted."""

    @property
    def stalled_s(self) -> float:
        """Seconds since the step that runs now began; 0.0 where none runs.  Thread-safe."""
        ...


class StepWatch:
    """Knows how long a step has lasted, from `begin` to `end` or within `with`; for `Watched`."""

    def __init__(self) -> None:
        self._began_at = math.inf

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self) -> None:
        """Count from now."""
        self._began_at = time.monotonic()

    def end(self) -> None:
        """Count no more."""
        self._began_at = math.inf

    @property
    def lasted_s(self) -> float:
        """Seconds since the step that runs now began; 0.0 where none runs."""
        return max(0.0, time.monotonic() - self._began_at)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds below what the engine was opened with; the default bounds nothing.

    `max_sequences` are sequences at once, 0 meaning that nothing new is taken while those that
    run finish; `prefill_chunk_tokens` are prompt tokens a step; None leaves either as opened.
    `decode_pause_s` is the time between the end of a step and the start of the next.
    """

    max_sequences: int | None = None
    prefill_chunk_tokens: int | None = None
    decode_pause_s: float = 0.0

    @property
    def admits(self) -> bool:
        """Whether new requests are taken."""
        return self.max_sequences is None or self.max_sequences > 0

    def check_admits(self, *, is_resumed: bool) -> None:
        """Raise Unavailable, with seconds to wait, where no new request is taken.

        A resumed one, whose answer has begun elsewhere, is none and may wait for its turn.
        """
        if not (self.admits or is_resumed):
            raise Unavailable(
                "The machine takes no new requests until it has recovered from heat, low power or "
                "memory pressure. Try again later.",
                retry_after_s=_RETRY_AFTER_S,
            )

    def apply_to(self, stepper: object) -> None:
        """Bound the prompt chunks of a stepper that can; on the thread that owns it."""
        if isinstance(stepper, PrefillLimited):
            stepper.limit_prefill(self.prefill_chunk_tokens)

    def sequences(self, capacity: int) -> int:
        """Return how many sequences may run at once in an engine that holds `capacity`."""
        return capacity if self.max_sequences is None else min(capacity, self.max_sequences)

    def rest(self) -> None:
        """Pause the calling thread between two batches that nobody waits to see step by step."""
        if self.decode_pause_s:
            time.sleep(self.decode_pause_s)

    def pause_left_s(self, stepped_at: float, now: float) -> float:
        """Return the seconds until the next step may start; 0 when it may at once."""
        return max(stepped_at + self.decode_pause_s - now, 0.0)


UNLIMITED = EngineLimits()
