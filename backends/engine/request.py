"""One request inside a token engine: its state, usage and timing, and delivery of its result."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from backends.base import EventReceiver, OnLogits
from backends.engine.failures import failing_alone
from backends.prefixes.reuse import Reuse
from backends.prompt.prepare import Prepared
from backends.stepper import SequenceSpec
from core.errors import ImpetusError, RequestFailed
from core.types import (
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Timing,
    TokenLogprob,
    Usage,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# (request id, events) pairs, and those of one step for each receiver, by the receiver's id().
Entries: TypeAlias = list[tuple[str, Sequence[GenerationEvent]]]
StepEvents: TypeAlias = dict[int, tuple[EventReceiver, Entries]]


def resolve_future(
    loop: asyncio.AbstractEventLoop, done: "asyncio.Future[Result]", outcome: Result | ImpetusError
) -> None:
    """Give a result or an error to the task that waits for `done`; thread-safe.

    A future that is done already is left alone, and so is one whose event loop is closed.
    """

    def resolve() -> None:
        if done.done():
            return
        if isinstance(outcome, ImpetusError):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:
        logger.debug("the event loop of a finished request is closed")


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One request inside the engine; once submitted, only the engine's thread uses it.

    `completion_tokens` counts tokens that this engine generated.  `throttled_s` is a running
    difference: the pacer's clocks are subtracted when a wait begins and added when it ends.
    """

    generation: GenerationRequest
    prepared: Prepared
    receiver: EventReceiver
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
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    on_logits: OnLogits | None = None

    @property
    def label(self) -> str:
        """Its name in the log."""
        return f"request {self.generation.id}"

    def spec(self) -> SequenceSpec:
        """Return the sequence for the stepper."""
        prepared = self.prepared
        return SequenceSpec(
            self.id,
            prepared.prompt,
            prepared.sampling,
            # Where only the prompt is scored, one token is sampled and dropped.
            max(prepared.max_tokens, 1),
            prepared.mask,
            prepared.generated,
            self.generation.reads_cache,
            self.on_logits,
        )

    def finish(self, reason: FinishReason, now: float) -> Finished:
        """Return the last event; `now` is monotonic seconds.

        `reason` applies only if the assembler found no other reason in the text.
        """
        prepared = self.prepared
        prompt_tokens = len(prepared.prompt) - prepared.generated
        usage = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=prepared.generated + self.completion_tokens,
            # In a resumed request, tokens of the answer may have been cached as well.
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
        """Finish a request for 0 new tokens: it gets its own prompt at most.

        Raises RequestFailed if its events cannot be delivered.
        """
        self.added_at = self.first_token_at = now
        with failing_alone("the delivery of its end", self.label):
            finished = self.finish("length", now)
            self.receiver.deliver(
                [(self.generation.id, [*self.prepared.take_initial_events(), finished])]
            )
        return finished

    def outcome(self, reason: FinishReason, now: float) -> Finished | RequestFailed:
        """Return the last event, or RequestFailed if the grammar could not be enforced."""
        mask = self.prepared.mask
        if mask is not None and mask.problem:
            return RequestFailed(
                f"The answer's grammar could not be enforced to the end: {mask.problem}. "
                "Simplify the JSON schema or grammar."
            )
        return self.finish(reason, now)

    def resolve(self, outcome: Finished | ImpetusError) -> None:
        """Give the result to the waiting task; thread-safe."""
        resolve_future(self.loop, self.done, outcome)


@dataclass(slots=True)
class Inbox:
    """Commands of other threads for the engine's thread."""

    submitted: deque[EngineRequest] = field(default_factory=deque)
    cancelled: deque[EngineRequest] = field(default_factory=deque)
    is_closing: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is no command."""
        return not (self.submitted or self.cancelled or self.is_closing)

    def clear(self) -> None:
        """Forget the commands that were applied; `is_closing` stays."""
        self.submitted.clear()
        self.cancelled.clear()


class QueueReceiver:
    """Puts one request's events into a queue of its event loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[GenerationEvent | None]"
    ) -> None:
        self._loop = loop
        self._queue = queue

    def deliver(self, batch: Sequence[tuple[str, Sequence[GenerationEvent]]]) -> None:
        """Queue the events; drops them if the event loop is closed.  See `EventReceiver`."""
        try:
            for _, events in batch:
                for event in events:
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:
            logger.debug("the event loop of a request is closed")


async def events_of(
    stream_to: Callable[[GenerationRequest, EventReceiver], Awaitable[Finished]],
    request: GenerationRequest,
) -> AsyncGenerator[GenerationEvent, None]:
    """Yield the events of `stream_to` up to the last one; closing the generator cancels it."""
    queue: asyncio.Queue[GenerationEvent | None] = asyncio.Queue()
    receiver = QueueReceiver(asyncio.get_running_loop(), queue)
    work = asyncio.ensure_future(stream_to(request, receiver))
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
