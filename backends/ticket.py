"""One request's way through a token engine."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from backends.base import EventSink, SequenceSpec
from backends.prepare import Prepared
from core.errors import ImpetusError
from core.types import (
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Timing,
    Usage,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Ticket:
    """One request inside the engine; touched by the engine's thread only once submitted."""

    request: GenerationRequest
    prepared: Prepared
    sink: EventSink
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[Finished]"
    submitted_at: float
    id: int = 0
    added_at: float = 0.0
    first_token_at: float = 0.0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def spec(self) -> SequenceSpec:
        """Return what the stepper needs."""
        prepared = self.prepared
        return SequenceSpec(
            self.id, prepared.prompt, prepared.sampling, prepared.max_tokens, prepared.mask
        )

    def finish(self, reason: FinishReason, now: float) -> Finished:
        """Return the last event; `now` is monotonic seconds."""
        usage = Usage(
            prompt_tokens=len(self.prepared.prompt),
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            reasoning_tokens=self.prepared.assembler.reasoning_tokens,
        )
        timing = Timing(
            queued_s=self.added_at - self.submitted_at,
            prefill_s=self.first_token_at - self.added_at,
            decode_s=now - self.first_token_at,
        )
        return Finished(reason, usage, timing)

    def resolve(self, outcome: Finished | ImpetusError) -> None:
        """Hand the result to the waiting task; callable from any thread."""

        def settle() -> None:
            if self.done.done():
                return
            if isinstance(outcome, Finished):
                self.done.set_result(outcome)
            else:
                self.done.set_exception(outcome)

        try:
            self.loop.call_soon_threadsafe(settle)
        except RuntimeError:
            logger.debug("the loop of request %s is closed", self.request.id)


@dataclass(slots=True)
class Inbox:
    """What other threads ask of the engine's thread."""

    submitted: deque[Ticket] = field(default_factory=deque)
    cancelled: deque[Ticket] = field(default_factory=deque)
    is_closing: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not (self.submitted or self.cancelled or self.is_closing)


class LoopSink:
    """Hands one request's events to its event loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[GenerationEvent | None]"
    ) -> None:
        self._loop = loop
        self._queue = queue

    def deliver(self, batch: Sequence[tuple[str, Sequence[GenerationEvent]]]) -> None:
        for _, events in batch:
            for event in events:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
