"""Runtime limits of engines: sequences, prefill chunk, pauses, deadlines."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from core.awake_time import AwakeTimeout
from core.errors import TimedOut, Unavailable

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
    """An engine that reports how long its current work has lasted."""

    @property
    def stalled_s(self) -> float:
        """Seconds that the oldest running activity has lasted; 0.0 if none runs.  Thread-safe.

        Activities are steps, preparations of requests, embedding batches, and the rest of what
        the engine's threads do: adding and removing sequences, chores, opening and closing.
        """
        ...


@asynccontextmanager
async def deadline(limit_s: float | None, what: str = "tokens") -> AsyncGenerator[None, None]:
    """Cancel the body after `limit_s` seconds awake and raise TimedOut; None: never.

    A TimeoutError that the body raises itself is passed on.
    """
    try:
        async with AwakeTimeout(limit_s) as timeout:
            yield
    except TimeoutError as problem:
        if not timeout.expired():
            raise
        raise TimedOut.after(limit_s, what) from problem


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
