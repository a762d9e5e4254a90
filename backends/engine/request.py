"""One request's way through a token engine."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from backends.base import EventSink
from backends.prefixes.reuse import Reuse
from backends.prompt.prepare import Prepared
from backends.stepper import SequenceSpec
from core.errors import EngineFailed, ImpetusError
from core.types import (
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Timing,
    Usage,
)

logger = logging.getLogger(__name__)

# One step's events by sink: (request id, events) pairs.
StepEvents = dict[int, tuple[EventSink, list[tuple[str, Sequence[GenerationEvent]]]]]


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One request inside the engine; touched by the engine's thread only once submitted.

    `completion_tokens` are those that this engine generated.  `throttled_s` is a balance: what
    the pacer's clocks showed when a wait began is taken off, what they show at its end added.
    """

    generation: GenerationRequest
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
    throttled_s: float = 0.0
    reuse: Reuse | None = None

    def spec(self) -> SequenceSpec:
        """Return what the stepper needs."""
        prepared = self.prepared
        return SequenceSpec(
            self.id,
            prepared.prompt,
            prepared.sampling,
            prepared.max_tokens,
            prepared.mask,
            prepared.generated,
        )

    def finish(self, reason: FinishReason, now: float) -> Finished:
        """Return the last event; `now` is monotonic seconds.

        `reason` counts where the text itself has not ended for another one.
        """
        prepared = self.prepared
        prompt_tokens = len(prepared.prompt) - prepared.generated
        usage = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=prepared.generated + self.completion_tokens,
            # A continued answer's first part may have been found computed as well.
            cached_tokens=min(self.cached_tokens, prompt_tokens),
            reasoning_tokens=prepared.assembler.reasoning_tokens,
        )
        timing = Timing(
            queued_s=self.added_at - self.submitted_at,
            prefill_s=self.first_token_at - self.added_at,
            decode_s=now - self.first_token_at,
            throttled_s=max(self.throttled_s, 0.0),
        )
        cache = None
        if self.reuse is not None:
            prompt = prepared.prompt[:prompt_tokens]
            cache = self.reuse.outcome(prompt, usage.cached_tokens, prepared.token_bytes)
        assembler = prepared.assembler
        return Finished(
            assembler.reason or reason,
            usage,
            timing,
            stop=assembler.matched_stop,
            mismatches=assembler.mismatches,
            cache=cache,
        )

    def finish_at_once(self, now: float) -> Finished:
        """Answer a request that wants no new token: its own prompt at most."""
        self.added_at = self.first_token_at = now
        finished = self.finish("length", now)
        self.sink.deliver([(self.generation.id, [*self.prepared.take_opening(), finished])])
        return finished

    def outcome(self, reason: FinishReason, now: float) -> Finished | EngineFailed:
        """Return the last event, or the failure of a grammar that could not be followed."""
        mask = self.prepared.mask
        if mask is not None and mask.problem:
            return EngineFailed(f"The answer's grammar became too complex: {mask.problem}")
        return self.finish(reason, now)

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
            logger.debug("the loop of request %s is closed", self.generation.id)


@dataclass(slots=True)
class Inbox:
    """What other threads ask of the engine's thread."""

    submitted: deque[EngineRequest] = field(default_factory=deque)
    cancelled: deque[EngineRequest] = field(default_factory=deque)
    is_closing: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not (self.submitted or self.cancelled or self.is_closing)

    def clear(self) -> None:
        """Forget the orders, which were taken; closing is for ever."""
        self.submitted.clear()
        self.cancelled.clear()


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


async def events_of(
    stream_to: Callable[[GenerationRequest, EventSink], Awaitable[Finished]],
    request: GenerationRequest,
) -> AsyncGenerator[GenerationEvent, None]:
    """Yield what `stream_to` gives to its sink, up to the last event; closing cancels it."""
    queue: asyncio.Queue[GenerationEvent | None] = asyncio.Queue()
    sink = LoopSink(asyncio.get_running_loop(), queue)
    work = asyncio.ensure_future(stream_to(request, sink))
    work.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (event := await queue.get()) is not None:
            yield event
            if isinstance(event, Finished):
                return
        work.result()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
