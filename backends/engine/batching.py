"""Continuous batching for every token-level format: an Engine for asyncio over any Stepper."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from backends.base import Engine, EngineLoad, EventReceiver, ModelInfo, OnLogits
from backends.engine.accelerator_lock import AcceleratorLock
from backends.engine.activity import NO_ACTIVITY, REQUEST_ID, Activity
from backends.engine.failures import failing_alone
from backends.engine.loop import EngineLoop
from backends.engine.preparation import PreparationThreads
from backends.engine.request import EngineRequest, events_of
from backends.engine.waiting import Admission
from backends.limits import EngineLimits, deadline
from backends.prompt.prepare import Prepared, Preparer
from backends.stepper import Stepper
from backends.watch import StepWatch
from core.types import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    Prompt,
    TokenizedPrompt,
    TokenizeOptions,
)

Result = TypeVar("Result")


class BatchingEngine(Engine):
    """Runs requests of one event loop on an `EngineLoop`.

    The stepper is created and used on a thread of its own; requests are prepared (template,
    tokens, grammar) on others, so the event loop never runs model code.
    """

    def __init__(
        self,
        info: ModelInfo,
        preparer: Preparer,
        open_stepper: Callable[[], Stepper],
        *,
        max_waiting: int,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the stepper; blocks until it is open and raises what that raises.

        `interrupt` is called by `close`, on the caller's thread: a running step may then
        raise, and need not be waited for.
        """
        self.info = info
        self._interrupt = interrupt
        self.context_tokens = preparer.context_tokens
        self._preparer = preparer
        self._admission = Admission(max_waiting)
        self._preparing = 0
        self._activity: Activity = NO_ACTIVITY
        self._watch = StepWatch()
        self._threads = PreparationThreads(self._watch)
        # Beside the loading of the weights, and not with the first grammar, which delays others.
        self._threads.submit(preparer.read_vocabulary)
        try:
            self._loop = EngineLoop(info.name, open_stepper, self._stop_preparing)
        except BaseException:
            self._stop_preparing()
            raise
        self.max_sequences = self._loop.max_sequences
        self.limitations = (*self._loop.limitations, *preparer.limitations())

    def _stop_preparing(self) -> None:
        """Wait for the requests that are being prepared: they use the stepper's vocabulary."""
        self._preparer.close()
        self._threads.close()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the request's events; see `Engine.generate`."""
        return events_of(self.stream_to, request)

    async def stream_to(self, request: GenerationRequest, receiver: EventReceiver) -> Finished:
        """Run the request with its events going to `receiver`; see `Engine.stream_to`."""
        return await self._stream_to(request, receiver, None)

    async def read_logits(
        self, request: GenerationRequest, receiver: EventReceiver, on_logits: OnLogits
    ) -> Finished:
        """See `GivesLogits`."""
        return await self._stream_to(request, receiver, on_logits)

    async def _stream_to(
        self, request: GenerationRequest, receiver: EventReceiver, on_logits: OnLogits | None
    ) -> Finished:
        self._loop.check_open()
        self._loop.limits.check_admits(is_resumed=bool(request.generated))
        self._admit(request)
        try:
            async with deadline(request.deadline_s):
                return await self._run(request, receiver, on_logits)
        except BaseException:
            self._admission.give_up(request)
            raise

    def _admit(self, request: GenerationRequest) -> None:
        """Raise QueueFull if the request, or the group to which it belongs, does not fit."""
        load = self.load()
        taken, slots = load.running + load.waiting, max(load.running, self._loop.most_running)
        if self._admission.admits(request, taken, slots, time.monotonic()):
            return
        raise self._loop.pace.refusal(
            load.waiting,
            self.max_sequences,
            self.info.name,
            most=self.max_sequences + self._admission.max_waiting,
            size=request.group.size if request.group is not None else 1,
        )

    async def _run(
        self,
        generation: GenerationRequest,
        receiver: EventReceiver,
        on_logits: OnLogits | None,
    ) -> Finished:
        submitted_at = time.monotonic()
        event_loop = asyncio.get_running_loop()
        prepared = await self._in_turn(lambda: self._prepare(generation), generation.id)
        done: asyncio.Future[Finished] = event_loop.create_future()
        request = EngineRequest(generation, prepared, receiver, event_loop, done, submitted_at)
        request.on_logits = on_logits
        if not prepared.max_tokens and prepared.sampling.prompt_logprobs is None:
            return request.finish_at_once(time.monotonic())
        self._loop.submit(request)
        try:
            return await done
        finally:
            if not done.done() or done.cancelled():
                self._loop.cancel(request)

    def _prepare(self, generation: GenerationRequest) -> Prepared:
        with self._activity.working(generation.id):
            return self._preparer.prepare(generation)

    async def _in_turn(self, work: Callable[[], Result], request_id: str) -> Result:
        """Do `work` on a thread for preparation; it is skipped or stopped if the caller leaves.

        Raises RequestFailed for what `work` was not meant to raise.
        """
        job = self._threads.submit(work)
        self._preparing += 1
        try:
            with failing_alone("its preparation", f"request {request_id}"):
                return await asyncio.wrap_future(job.done)
        finally:
            job.cancel()
            self._preparing -= 1

    async def count_tokens(self, prompt: Prompt) -> int:
        """Return the prompt's length; see `TokenCounting`."""
        self._loop.check_open()
        request_id = REQUEST_ID.get()
        return await self._in_turn(lambda: self._count(request_id, prompt), request_id)

    async def tokenize(self, prompt: Prompt, options: TokenizeOptions) -> TokenizedPrompt:
        """Return the prompt's text and tokens; see `TokenCounting`."""
        self._loop.check_open()
        request_id = REQUEST_ID.get()
        return await self._in_turn(lambda: self._tokenize(request_id, prompt, options), request_id)

    def _tokenize(
        self, request_id: str, prompt: Prompt, options: TokenizeOptions
    ) -> TokenizedPrompt:
        with self._activity.working(request_id):
            return self._preparer.tokenize(prompt, options)

    def _count(self, request_id: str, prompt: Prompt) -> int:
        with self._activity.working(request_id):
            return self._preparer.count(prompt)

    def set_limits(self, limits: EngineLimits) -> None:
        """Obey `limits` from the next step on; running sequences go on.  Thread-safe."""
        self._loop.set_limits(limits)

    def share_accelerator(self, lock: AcceleratorLock) -> None:
        """See `SharesAccelerator`."""
        self._loop.share_accelerator(lock)

    def record_activity(self, activity: Activity) -> None:
        """See `RecordsActivity`."""
        self._activity = activity
        self._loop.record_activity(activity)

    def load(self) -> EngineLoad:
        """Return the current counts; requests that are being prepared count as waiting."""
        return self._loop.load(self._preparing)

    async def close(self) -> None:
        """Fail all requests, free the stepper and join the thread; idempotent."""
        self._loop.begin_close()
        self._interrupt()
        await asyncio.get_running_loop().run_in_executor(None, self._loop.close)

    @property
    def is_failed(self) -> bool:
        """Whether a step failed; the engine must be opened again."""
        return self._loop.is_failed

    @property
    def stalled_s(self) -> float:
        """Seconds that the oldest step or preparation has lasted; see `backends.limits.Watched`."""
        return 0.0 if self.is_failed else max(self._loop.stalled_s, self._watch.lasted_s)
