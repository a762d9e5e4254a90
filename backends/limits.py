"""Runtime limits of engines (sequences, prefill chunk, pauses), and detection of hung steps."""

import math
import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from core.errors import Unavailable

_RETRY_AFTER_S = 30


@runtime_checkable
class PrefillLimited(Protocol):
    """A stepper whose prefill chunk can be reduced while it runs."""

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        """Compute at most `chunk_tokens` prompt tokens per step; None: as opened."""
        ...


@runtime_checkable
class Limitable(Protocol):
    """An engine that supports runtime limits."""

    def set_limits(self, limits: "EngineLimits") -> None:
        """Apply `limits` from the next step on.  Thread-safe; never blocks on a step."""
        ...


@runtime_checkable
class Watched(Protocol):
    """An engine that reports how long its current step has lasted."""

    @property
    def stalled_s(self) -> float:
        """Seconds since the current step began; 0.0 if none is running.  Thread-safe."""
        ...


class StepWatch:
    """Measures a step's duration, from `begin` to `end` or as a context manager."""

    def __init__(self) -> None:
        self._began_at = math.inf

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self) -> None:
        """Start measuring."""
        self._began_at = time.monotonic()

    def end(self) -> None:
        """Stop measuring."""
        self._began_at = math.inf

    @property
    def lasted_s(self) -> float:
        """Seconds since the current step began; 0.0 if none is running."""
        return max(0.0, time.monotonic() - self._began_at)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits below those that the engine was opened with; the default limits nothing.

    `max_sequences` limits concurrent sequences; 0 rejects new requests while running ones finish.
    `prefill_chunk_tokens` limits prompt tokens per step.  None leaves either as opened.
    `decode_pause_s` is the pause between the end of a step and the start of the next.
    """

    max_sequences: int | None = None
    prefill_chunk_tokens: int | None = None
    decode_pause_s: float = 0.0

    @property
    def admits(self) -> bool:
        """Whether new requests are accepted."""
        return self.max_sequences is None or self.max_sequences > 0

    def check_admits(self, *, is_resumed: bool) -> None:
        """Raise Unavailable, with seconds to wait, if new requests are rejected.

        Resumed requests are not new: they may wait.
        """
        if not (self.admits or is_resumed):
            raise Unavailable(
                "The machine accepts no new requests until it has recovered from heat, low power "
                f"or memory pressure. Retry in {_RETRY_AFTER_S} s.",
                retry_after_s=_RETRY_AFTER_S,
            )

    def apply_to(self, stepper: object) -> None:
        """Limit a stepper's prefill chunk, if it supports that; call on the thread that owns it."""
        if isinstance(stepper, PrefillLimited):
            stepper.limit_prefill(self.prefill_chunk_tokens)

    def sequences(self, capacity: int) -> int:
        """Return the maximum concurrent sequences of an engine with `capacity` slots."""
        return capacity if self.max_sequences is None else min(capacity, self.max_sequences)

    def rest(self) -> None:
        """Pause the calling thread between two batches, such as of embeddings."""
        if self.decode_pause_s:
            time.sleep(self.decode_pause_s)

    def pause_left_s(self, stepped_at: float, now: float) -> float:
        """Return the seconds until the next step may start; 0 if it may start now."""
        return max(stepped_at + self.decode_pause_s - now, 0.0)


UNLIMITED = EngineLimits()
