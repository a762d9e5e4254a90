"""One engine for every token-level format: a thread that drives a Stepper."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from backends.base import Engine, EngineLoad, EventSink, ModelInfo
from backends.engine.accelerator_lock import AcceleratorLock
from backends.engine.pacing import Pacer
from backends.engine.request import EngineRequest, Inbox, StepEvents, events_of
from backends.engine.threads import name_this_thread
from backends.engine.waiting import Pace, WaitingQueue
from backends.limits import EngineLimits, StepWatch
from backends.prompt.prepare import Preparer
from backends.stepper import StepOutput, Stepper, do_chore, has_chores
from core.errors import EngineFailed, ImpetusError, TimedOut
from core.types import Finished, GenerationEvent, GenerationRequest, PrefillProgress, Prompt

logger = logging.getLogger(__name__)

THREAD_NAME = "impetus-engine"


class BatchingEngine(Engine):
    """Continuous batching for any Stepper.

    The stepper is created and used on one thread of its own; requests are prepared (template,
    tokens, grammar) on another, so that no event loop ever runs model code.
    """

    def __init__(
        self,
        info: ModelInfo,
        preparer: Preparer,
        open_stepper: Callable[[], Stepper],
        *,
        max_waiting: int,
    ) -> None:
        """Open the stepper; blocks until it is ready and raises what it raises."""
        self.info, self.context_tokens = info, preparer.context_tokens
        self._preparer, self._max_waiting = preparer, max_waiting
        self._wake, self._inbox = threading.Condition(), Inbox()
        self._waiting, self._pace = WaitingQueue(), Pace()
        self._running: dict[int, EngineRequest] = {}
        self._next_id = self._preparing = 0
        self._failure: ImpetusError | None = None
        self._pacer, self._watch = Pacer(), StepWatch()
        self._take_turn: Callable[[], AbstractContextManager[None]] = nullcontext
        self._counters = EngineLoad()
        self._ended: list[tuple[EngineRequest, Finished | EngineFailed]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="impetus-prepare")
        self._start(open_stepper)

    def _start(self, open_stepper: Callable[[], Stepper]) -> None:
        ready, problems = threading.Event(), list[BaseException]()

        def run() -> None:
            name_this_thread(THREAD_NAME)
            try:
                stepper = open_stepper()
            except BaseException as problem:
                problems.append(problem)
                ready.set()
                return
            self.max_sequences = stepper.max_sequences
            ready.set()
            self._drive(stepper)

        self._thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
        self._thread.start()
        ready.wait()
        if problems:
            self._pool.shutdown(wait=False)
            self._preparer.close()
            raise problems[0]

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the request's events; see `Engine.generate`."""
        return events_of(self.stream_to, request)

    async def stream_to(self, request: GenerationRequest, sink: EventSink) -> Finished:
        """Run the request with its events going to `sink`; see `Engine.stream_to`."""
        self._check_open()
        self._pacer.limits.check_admits(is_resumed=bool(request.generated))
        # A resumed answer was admitted once already.
        if not request.generated and self.load().waiting >= self._max_waiting:
            raise self._pace.refusal(self._max_waiting, self.max_sequences, self.info.name)
        try:
            async with asyncio.timeout(request.deadline_s):
                return await self._run(request, sink)
        except TimeoutError as problem:
            raise TimedOut.after(request.deadline_s) from problem

    async def _run(self, request: GenerationRequest, sink: EventSink) -> Finished:
        submitted_at = time.monotonic()
        loop = asyncio.get_running_loop()
        self._preparing += 1
        try:
            prepared = await loop.run_in_executor(self._pool, self._preparer.prepare, request)
        finally:
            self._preparing -= 1
        ticket = EngineRequest(request, prepared, sink, loop, loop.create_future(), submitted_at)
        if not prepared.max_tokens:
            return ticket.finish_at_once(time.monotonic())
        self._submit(ticket)
        try:
            return await ticket.done
        finally:
            if not ticket.done.done() or ticket.done.cancelled():
                self._cancel(ticket)

    async def count_tokens(self, prompt: Prompt) -> int:
        """Return the prompt's length; see `TokenCounting`."""
        self._check_open()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._preparer.count, prompt)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineFailed(self._failure.message)
        if self._inbox.is_closing:
            raise EngineFailed(f"The model {self.info.name} is being unloaded.")

    def _submit(self, ticket: EngineRequest) -> None:
        with self._wake:
            self._check_open()
            self._next_id += 1
            ticket.id = self._next_id
            self._inbox.submitted.append(ticket)
            self._wake.notify()

    def _cancel(self, ticket: EngineRequest) -> None:
        with self._wake:
            self._inbox.cancelled.append(ticket)
            self._wake.notify()

    def set_limits(self, limits: EngineLimits) -> None:
        """Obey `limits` from the next step on; sequences that run go on.  Thread-safe."""
        with self._wake:
            self._pacer.limits = limits
            self._wake.notify()

    def share_accelerator(self, lock: AcceleratorLock) -> None:
        """See `SharesAccelerator`."""
        self._take_turn = lock.turn

    def load(self) -> EngineLoad:
        """Return the counts of this moment."""
        return replace(
            self._counters,
            running=len(self._running),
            waiting=len(self._waiting) + len(self._inbox.submitted) + self._preparing,
        )

    async def close(self) -> None:
        """Fail what runs, free the stepper, and join the thread; twice is fine."""
        with self._wake:
            self._inbox.is_closing = True
            self._wake.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @property
    def is_failed(self) -> bool:
        """Whether a step failed; the engine is of no more use then."""
        return self._failure is not None

    @property
    def stalled_s(self) -> float:
        """Seconds that the current step has lasted; a failed engine steps no more."""
        return 0.0 if self.is_failed else self._watch.lasted_s

    def _drive(self, stepper: Stepper) -> None:
        """Step until closed.  Runs on the engine's thread."""
        reason = f"The model {self.info.name} was unloaded."
        try:
            while self._take_orders(stepper):
                self._deliver(self._step(stepper))
        except BaseException as problem:
            logger.exception("engine of %s failed", self.info.name)
            reason = f"The engine of {self.info.name} failed: {problem}"
            self._failure = EngineFailed(reason)
        finally:
            with self._wake:
                self._inbox.is_closing = True
                left = [*self._running.values(), *self._waiting, *self._inbox.submitted]
                self._running.clear()
                self._waiting.clear()
                self._inbox.submitted.clear()
            for ticket in left:
                ticket.resolve(EngineFailed(reason))
            # Preparing uses the vocabulary, which goes with the stepper.
            self._pool.shutdown(wait=True)
            self._preparer.close()
            stepper.close()

    def _take_orders(self, stepper: Stepper) -> bool:
        """Apply orders; wait for one while idle or between paced steps; False when closing."""
        with self._wake:
            while self._inbox.is_empty and (rest_s := self._rest_s(stepper)) != 0:
                self._pacer.rest(self._wake, rest_s)
            if self._inbox.is_closing:
                return False
            for ticket in self._inbox.submitted:
                ticket.throttled_s -= self._pacer.held_s()
            self._waiting.extend(self._inbox.submitted)
            cancelled = list(self._inbox.cancelled)
            self._inbox.clear()
        for ticket in cancelled:
            self._drop(stepper, ticket)
        self._pacer.apply_to(stepper)
        self._start_waiting(stepper)
        return True

    def _rest_s(self, stepper: Stepper) -> float | None:
        """Return how long there is nothing to do; None until an order comes."""
        if self._running or (self._waiting and self._pacer.limits.sequences(stepper.max_sequences)):
            return self._pacer.pause_left_s()
        return 0 if has_chores(stepper) else None

    def _drop(self, stepper: Stepper, ticket: EngineRequest) -> None:
        if self._running.pop(ticket.id, None) is not None:
            stepper.remove(ticket.id)
        else:
            self._waiting.discard(ticket)

    def _start_waiting(self, stepper: Stepper) -> None:
        most = self._pacer.limits.sequences(stepper.max_sequences)
        while self._waiting and len(self._running) < most:
            ticket = self._waiting.popleft()
            ticket.added_at = time.monotonic()
            ticket.throttled_s += self._pacer.held_s() - self._pacer.paused_s
            try:
                stepper.add(ticket.spec())
            except ImpetusError as problem:
                ticket.resolve(problem)
                continue
            self._running[ticket.id] = ticket
        self._pacer.note_held(bool(self._waiting) and len(self._running) < stepper.max_sequences)

    def _step(self, stepper: Stepper) -> StepEvents:
        # An order may have ended the pause before the next step is due.
        if not self._running or self._pacer.pause_left_s():
            do_chore(stepper)
            return {}
        events: StepEvents = {}
        with self._take_turn():
            self._watch.begin()
            outputs = stepper.step()
        now = 0.0
        for output in outputs:
            now = now or time.monotonic()
            ticket = self._running[output.sequence_id]
            batch = self._advance(stepper, ticket, output, now)
            if batch:
                _, entries = events.setdefault(id(ticket.sink), (ticket.sink, []))
                entries.append((ticket.request.id, batch))
        self._watch.end()
        self._pacer.note_step()
        self._counters = stepper.counters()
        return events

    def _advance(
        self, stepper: Stepper, ticket: EngineRequest, output: StepOutput, now: float
    ) -> list[GenerationEvent]:
        """Turn one output into events; end the sequence when it is done."""
        ticket.cached_tokens, ticket.reuse = output.cached, output.reuse
        assembler = ticket.prepared.assembler
        if output.token_id is None:
            return [PrefillProgress(output.prefilled, len(ticket.prepared.prompt))]
        events: list[GenerationEvent] = []
        if not ticket.completion_tokens:
            ticket.first_token_at = now
            events.extend(ticket.prepared.take_opening())
        ticket.completion_tokens += 1
        events.extend(assembler.push(output))
        if assembler.reason is not None:
            ticket.throttled_s += self._pacer.paused_s
            outcome = ticket.outcome(assembler.reason, now)
            self._pace.note(now - ticket.added_at)
            events += [outcome] if isinstance(outcome, Finished) else []
            del self._running[ticket.id]
            stepper.remove(ticket.id)
            self._ended.append((ticket, outcome))
        return events

    def _deliver(self, events: StepEvents) -> None:
        """Hand out the step's events, then the results: an end never overtakes its text."""
        for sink, entries in events.values():
            sink.deliver(entries)
        for ticket, outcome in self._ended:
            ticket.resolve(outcome)
        self._ended.clear()
