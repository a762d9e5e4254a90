"""The engine's thread: steps one Stepper, starts waiting requests and delivers their events."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from backends.base import EngineLoad, EventReceiver
from backends.engine.accelerator_lock import AcceleratorLock
from backends.engine.activity import NO_ACTIVITY, Activity
from backends.engine.failures import request_error
from backends.engine.guarded_stepper import GuardedStepper
from backends.engine.pacing import Pacer
from backends.engine.request import EngineRequest, Entries, Inbox, StepEvents
from backends.engine.threads import name_this_thread
from backends.engine.waiting import Pace, WaitingQueue
from backends.limits import EngineLimits
from backends.stepper import StepOutput, Stepper
from backends.watch import StepWatch
from core.errors import BrokenModel, EngineFailed, ImpetusError
from core.types import Finished, GenerationEvent, PrefillProgress

logger = logging.getLogger(__name__)

THREAD_NAME = "impetus-engine"


class EngineLoop:
    """A thread that creates, steps and closes one Stepper; every method is thread-safe.

    Other threads put commands into the inbox; the thread applies them between two steps.
    Whatever fails for one request ends that request alone.  A step that raises ends the thread:
    all requests fail, and no new ones are accepted.  Each submitted request is resolved exactly
    once, unless it was cancelled before.
    """

    def __init__(
        self,
        model_name: str,
        open_stepper: Callable[[], Stepper],
        before_close: Callable[[], None],
    ) -> None:
        """Start the thread; blocks until the stepper is open and raises what that raises.

        `before_close` runs on the thread at its end, when no request is left.
        """
        self._model_name = model_name
        self._before_close = before_close
        self._wake = threading.Condition()
        self._inbox = Inbox()
        self._waiting = WaitingQueue()
        self._running: dict[int, EngineRequest] = {}
        self._ended: list[tuple[EngineRequest, Finished | ImpetusError]] = []
        self._last_id = 0
        self._failure: EngineFailed | None = None
        self._pacer = Pacer()
        self.watch = StepWatch()
        self._counters = EngineLoad()
        self._hold_accelerator: Callable[[], AbstractContextManager[None]] = nullcontext
        self._activity: Activity = NO_ACTIVITY
        self._stepper: GuardedStepper
        self.pace = Pace()
        self._thread = self._start(open_stepper)

    def _start(self, open_stepper: Callable[[], Stepper]) -> threading.Thread:
        opened: Future[None] = Future()

        def run() -> None:
            name_this_thread(THREAD_NAME)
            try:
                self._stepper = GuardedStepper(open_stepper(), self._model_name)
            except SystemExit as problem:
                # Raised again on the loader's thread it would end this process.
                refusal = BrokenModel(
                    f"The model {self._model_name} cannot be loaded: the code of its architecture "
                    f"ends the process that imports it (exit code {problem.code}).",
                    param="model",
                )
                refusal.__cause__ = problem
                opened.set_exception(refusal)
                return
            except BaseException as problem:
                opened.set_exception(problem)
                return
            opened.set_result(None)
            self._drive()

        thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
        thread.start()
        opened.result()
        return thread

    @property
    def max_sequences(self) -> int:
        """Sequences that the stepper can run at once."""
        return self._stepper.max_sequences

    @property
    def most_running(self) -> int:
        """Sequences that may run at once under the limits set last."""
        return self._pacer.limits.sequences(self._stepper.max_sequences)

    @property
    def limitations(self) -> tuple[str, ...]:
        """What the stepper does otherwise than usual, in sentences for the user."""
        return self._stepper.limitations

    @property
    def limits(self) -> EngineLimits:
        """The limits set last."""
        return self._pacer.limits

    @property
    def is_failed(self) -> bool:
        """Whether a step raised."""
        return self._failure is not None

    @property
    def stalled_s(self) -> float:
        """Seconds that what the thread does now has lasted; 0.0 while it waits."""
        return self.watch.lasted_s

    def check_open(self) -> None:
        """Raise EngineFailed when no request is accepted any more."""
        if self._failure is not None:
            raise EngineFailed(self._failure.message)
        if self._inbox.is_closing:
            raise EngineFailed(f"The model {self._model_name} is being unloaded.")

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.  Raises EngineFailed."""
        with self._wake:
            self.check_open()
            self._last_id += 1
            request.id = self._last_id
            self._inbox.submitted.append(request)
            self._wake.notify()

    def cancel(self, request: EngineRequest) -> None:
        """Drop a request, whether it waits or runs; it gets no result."""
        with self._wake:
            self._inbox.cancelled.append(request)
            self._wake.notify()

    def set_limits(self, limits: EngineLimits) -> None:
        """Obey `limits` from the next step on; running sequences go on."""
        with self._wake:
            self._pacer.limits = limits
            self._wake.notify()

    def share_accelerator(self, lock: AcceleratorLock) -> None:
        """Hold `lock` during each step; set it before the first request."""
        self._hold_accelerator = lock.hold

    def record_activity(self, activity: Activity) -> None:
        """Report steps and prefills to `activity`; set it before the first request."""
        self._activity = activity

    def load(self, preparing: int) -> EngineLoad:
        """Return the current counts; `preparing` requests wait as well."""
        waiting = len(self._waiting) + len(self._inbox.submitted) + preparing
        return replace(self._counters, running=len(self._running), waiting=waiting)

    def begin_close(self) -> None:
        """Accept no more requests, and end after the running step; idempotent."""
        with self._wake:
            self._inbox.is_closing = True
            self._wake.notify()

    def close(self) -> None:
        """Fail all requests, close the stepper and join the thread; blocks; idempotent."""
        self.begin_close()
        self._thread.join()

    def _drive(self) -> None:
        """Step until closed."""
        reason = f"The model {self._model_name} was unloaded."
        try:
            while self._apply_commands():
                self._finish_step(self._step())
                self.watch.end()
        except BaseException as problem:
            # A step that `close` interrupts raises as well.
            if not self._inbox.is_closing:
                logger.exception("engine of %s failed", self._model_name)
                reason = f"The engine of {self._model_name} failed: {str(problem)[:500]}"
                self._failure = EngineFailed(reason)
        finally:
            self.watch.begin()
            self._resolve_all(reason)
            try:
                self._before_close()
            except BaseException:
                logger.exception(
                    "%s: the preparation of requests cannot be ended", self._model_name
                )
            self._stepper.close()
            self.watch.end()

    def _resolve_all(self, reason: str) -> None:
        """Accept no more requests; resolve those that are left."""
        with self._wake:
            self._inbox.is_closing = True
            left = [*self._running.values(), *self._waiting, *self._inbox.submitted]
            self._running.clear()
            self._waiting.clear()
            self._inbox.submitted.clear()
        for request in left:
            request.resolve(EngineFailed(reason))
        for request, outcome in self._ended:
            # The last events of a finished request were not delivered.
            is_error = isinstance(outcome, ImpetusError)
            request.resolve(outcome if is_error else EngineFailed(reason))
        self._ended.clear()

    def _resolve_ended(self) -> None:
        for request, outcome in self._ended:
            request.resolve(outcome)
        self._ended.clear()

    def _apply_commands(self) -> bool:
        """Apply what other threads asked for; wait for it while idle; False when closing."""
        with self._wake:
            while self._inbox.is_empty and (idle_s := self._idle_s()) != 0:
                self._pacer.rest(self._wake, idle_s)
            if self._inbox.is_closing:
                return False
            for request in self._inbox.submitted:
                request.throttled_s -= self._pacer.limited_s()
            self._waiting.extend(self._inbox.submitted)
            cancelled = list(self._inbox.cancelled)
            self._inbox.clear()
        self.watch.begin()
        for request in cancelled:
            self._drop(request)
        self._stepper.apply_limits(self._pacer)
        self._start_waiting()
        self._resolve_ended()
        return True

    def _idle_s(self) -> float | None:
        """Return the seconds without anything to do; None: until a command comes."""
        can_run = self._running or (self._waiting and self.most_running)
        if can_run:
            return self._pacer.pause_left_s()
        return 0 if self._stepper.has_chores else None

    def _drop(self, request: EngineRequest) -> None:
        self._activity.end_prefill(request.generation.id)
        if self._running.pop(request.id, None) is not None:
            self._stepper.remove(request.id)
        else:
            self._waiting.discard(request)

    def _start_waiting(self) -> None:
        most = self.most_running
        while self._waiting and len(self._running) < most:
            request = self._waiting.popleft()
            request.added_at = time.monotonic()
            request.throttled_s += self._pacer.limited_s() - self._pacer.paused_s
            self._running[request.id] = request
            try:
                with self._activity.working(request.generation.id):
                    self._stepper.add(request.spec())
                self._activity.begin_prefill(request.generation.id)
            except BaseException as problem:
                self._fail(request, problem, "its start")
        has_room = len(self._running) < self._stepper.max_sequences
        self._pacer.set_limited(bool(self._waiting) and has_room)

    def _step(self) -> StepEvents:
        # A command may have ended the pause before the next step is due.
        if not self._running or self._pacer.pause_left_s():
            self._stepper.do_chore()
            return {}
        # While another engine holds the accelerator, this one does not hang.
        self.watch.end()
        with self._hold_accelerator():
            self.watch.begin()
            with self._activity.step:
                outputs = self._stepper.step()
        now = time.monotonic() if outputs else 0.0
        events: StepEvents = {}
        for output in outputs:
            request = self._running.get(output.sequence_id)
            if request is None:
                self._stepper.remove(output.sequence_id)
                continue
            try:
                batch = self._advance(request, output, now)
            except BaseException as problem:
                self._fail(request, problem, "the processing of its answer")
                continue
            if batch:
                _, entries = events.setdefault(id(request.receiver), (request.receiver, []))
                entries.append((request.generation.id, batch))
        self._pacer.note_step()
        self._counters = self._stepper.counters()
        return events

    def _advance(
        self, request: EngineRequest, output: StepOutput, now: float
    ) -> list[GenerationEvent]:
        """Turn one output into events; end the sequence when it is complete.

        Raises the output's problem, and whatever the request's own objects raise.
        """
        if output.problem is not None:
            raise output.problem
        request.cached_tokens, request.reuse = output.cached, output.reuse
        request.prompt_logprobs += output.prompt_logprobs
        assembler = request.prepared.assembler
        if output.token_id is None:
            return [PrefillProgress(output.prefilled, len(request.prepared.prompt))]
        events: list[GenerationEvent] = []
        if not request.completion_tokens:
            request.first_token_at = now
            self._activity.end_prefill(request.generation.id)
            if not request.prepared.generated:
                # Short prompts have no other progress that tells how many tokens they have.
                count = len(request.prepared.prompt)
                scores, request.prompt_logprobs = tuple(request.prompt_logprobs), []
                events.append(PrefillProgress(count, count, scores))
            events.extend(request.prepared.take_initial_events())
        if request.prepared.max_tokens:
            request.completion_tokens += 1
        events.extend(assembler.push(output))
        if assembler.reason is not None:
            request.throttled_s += self._pacer.paused_s
            outcome = request.outcome(assembler.reason, now)
            self.pace.note(now - request.added_at)
            events += [outcome] if isinstance(outcome, Finished) else []
            self._end(request, outcome)
        return events

    def _end(self, request: EngineRequest, outcome: Finished | ImpetusError) -> None:
        """Free a running request's sequence; it is resolved after its last events."""
        del self._running[request.id]
        self._ended.append((request, outcome))
        self._stepper.remove(request.id)

    def _fail(self, request: EngineRequest, problem: BaseException, activity: str) -> None:
        """End a running request, and no other one, with an error."""
        self._end(request, request_error(problem, activity, request.label))

    def _finish_step(self, events: StepEvents) -> None:
        """Deliver the step's events before the results: a result never overtakes its text."""
        for receiver, entries in events.values():
            try:
                receiver.deliver(entries)
            except BaseException as problem:
                self._deliver_one_by_one(receiver, entries, problem)
        self._resolve_ended()

    def _deliver_one_by_one(
        self, receiver: EventReceiver, entries: Entries, problem: BaseException
    ) -> None:
        """Deliver a batch that a receiver refused; fail the requests whose events it refuses."""
        for entry in entries:
            if len(entries) > 1:
                try:
                    receiver.deliver([entry])
                    continue
                except BaseException as refusal:
                    problem = refusal
            self._fail_delivery(receiver, entry[0], problem)

    def _fail_delivery(
        self, receiver: EventReceiver, generation_id: str, problem: BaseException
    ) -> None:
        activity = "the delivery of its events"
        for request in list(self._running.values()):
            if request.receiver is receiver and request.generation.id == generation_id:
                self._fail(request, problem, activity)
        for index, (request, outcome) in enumerate(self._ended):
            is_same = request.receiver is receiver and request.generation.id == generation_id
            if is_same and not isinstance(outcome, ImpetusError):
                self._ended[index] = (request, request_error(problem, activity, request.label))
