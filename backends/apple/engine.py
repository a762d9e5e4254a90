"""The engine over Apple's Foundation Models: one session for each request."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from backends.answer.assembler import StopMatcher
from backends.answer.parser import Piece
from backends.apple.request import read_session_request
from backends.apple.sessions import AppleSession, Ended, Failed, ForcedCall, SessionEvent, Snapshot
from backends.base import Engine, EngineLoad, EngineOptions, ModelInfo
from backends.engine.failures import failing_alone
from backends.engine.slot_gate import SlotGate
from backends.engine.waiting import Admission, Pace
from backends.limits import UNLIMITED, EngineLimits, deadline
from backends.prompt.chat_format import ChatFormat, OutputParser
from backends.tool_calls.collector import new_call_id
from core.awake_time import AwakeTimeout
from core.errors import (
    EngineFailed,
    ImpetusError,
    RequestFailed,
    TimedOut,
)
from core.types import (
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    MismatchKind,
    TextDelta,
    Timing,
    ToolCallDelta,
    Usage,
)

logger = logging.getLogger(__name__)

_JOIN_S = 5.0


class AppleEngine(Engine):
    """The system's language model; it gives neither token ids nor logprobs.

    Usage is counted by the system from macOS 26.4 on, before that it is an estimate.  A request
    fails if the system sends nothing for `idle_timeout_s` seconds.
    """

    def __init__(
        self,
        info: ModelInfo,
        model: Any,
        options: EngineOptions,
        *,
        context_tokens: int,
        idle_timeout_s: float = 120.0,
    ) -> None:
        """Open the engine; `model` is the SDK's SystemLanguageModel."""
        self.info = info
        self.context_tokens = context_tokens
        self.max_sequences = options.max_sequences
        self._model = model
        self._admission = Admission(options.max_waiting)
        self._idle_timeout_s = idle_timeout_s
        self._chat = ChatFormat(None, "", "", tool_parser=options.tool_parser)
        self._slots = SlotGate(options.max_sequences)
        self._waiting, self._pace = 0, Pace()
        self._snapshots = 0
        self._running: dict[AppleSession, asyncio.Queue[SessionEvent]] = {}
        # Their requests are over, their threads not yet.
        self._ending: set[AppleSession] = set()
        self._is_closed = False
        self._limits = UNLIMITED

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the request's events; see `Engine.generate`."""
        self._check_open()
        self._limits.check_admits(is_resumed=bool(request.generated))
        run = _RunningRequest(request, self._chat, time.monotonic())
        self._admit(request)
        try:
            await self._acquire_slot(request)
        except BaseException:
            self._admission.give_up(request)
            raise
        queue: asyncio.Queue[SessionEvent] = asyncio.Queue()
        session: AppleSession | None = None
        try:
            self._check_open()
            run.started_at = time.monotonic()
            session = self._start(run, queue)
            while not run.is_over:
                for event in run.events(await self._next(queue, run)):
                    yield event
                if run.is_cut:
                    session.stop()
                self._snapshots += 1
            self._pace.note(time.monotonic() - run.started_at)
        finally:
            if session is not None:
                self._end(session)
            self._slots.release()

    def _start(self, run: "_RunningRequest", queue: "asyncio.Queue[SessionEvent]") -> AppleSession:
        """Start the request's session.  Raises RequestFailed if the system has no thread left."""
        with failing_alone("the start of its session", run.label):
            session = AppleSession(
                self._model, self.context_tokens, run.session_request, _event_sender(queue)
            )
            session.start()
        self._running[session] = queue
        return session

    def _end(self, session: AppleSession) -> None:
        self._running.pop(session, None)
        _cancel(session)
        self._ending = {one for one in (*self._ending, session) if one.is_alive}

    def _admit(self, request: GenerationRequest) -> None:
        """Raise QueueFull if the request, or the group to which it belongs, does not fit."""
        slots, most = self.max_sequences, self.max_sequences + self._admission.max_waiting
        # A slot is taken before its session runs.
        taken = max(slots - self._slots.free, len(self._running)) + self._waiting
        if not self._admission.admits(request, taken, slots, time.monotonic()):
            size = request.group.size if request.group is not None else 1
            raise self._pace.refusal(self._waiting, slots, self.info.name, most=most, size=size)

    async def _acquire_slot(self, request: GenerationRequest) -> None:
        self._waiting += 1
        try:
            async with deadline(request.deadline_s):
                await self._slots.acquire(request.priority)
        finally:
            self._waiting -= 1

    async def _next(
        self, queue: "asyncio.Queue[SessionEvent]", run: "_RunningRequest"
    ) -> SessionEvent:
        """Return the session's next event.  Raises EngineFailed at the deadline or idle timeout."""
        left = run.seconds_left(time.monotonic())
        try:
            async with AwakeTimeout(min(left, self._idle_timeout_s)):
                return await queue.get()
        except TimeoutError as problem:
            if left <= self._idle_timeout_s:
                raise TimedOut.after(run.request.deadline_s) from problem
            raise EngineFailed(
                f"Nothing came from Apple's model for {self._idle_timeout_s:g} s; try again."
            ) from problem

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineFailed(f"The model {self.info.name} was unloaded.")

    def set_limits(self, limits: EngineLimits) -> None:
        """Apply whether new requests are admitted; the system paces its model itself."""
        self._limits = limits

    def load(self) -> EngineLoad:
        """Return the counts of this moment; a step is a snapshot of one answer."""
        return EngineLoad(running=len(self._running), waiting=self._waiting, steps=self._snapshots)

    async def close(self) -> None:
        """End all requests with EngineFailed, and wait for their threads; twice is fine."""
        self._is_closed = True
        sessions = [*self._running, *self._ending]
        for session, queue in list(self._running.items()):
            error = EngineFailed(f"The model {self.info.name} was unloaded.")
            queue.put_nowait(Failed(error))
            _cancel(session)
        loop = asyncio.get_running_loop()
        ends_at = time.monotonic() + _JOIN_S
        for session in sessions:
            left_s = max(ends_at - time.monotonic(), 0.0)
            if not await loop.run_in_executor(None, session.join, left_s):
                logger.warning(
                    "a session of Apple's model did not end within %g s; its thread is abandoned",
                    _JOIN_S,
                )


class _RunningRequest:
    """Converts the events of one session to generation events."""

    def __init__(self, request: GenerationRequest, chat: ChatFormat, submitted_at: float) -> None:
        """Validate the request.  Raises RequestError and subclasses."""
        self.request = request
        self.session_request, prompt = read_session_request(request)
        parser = (
            None
            if self.session_request.schema or self.session_request.forced
            else chat.parser(prompt, "")
        )
        self._answer = _Answer(request.stop, parser)
        self._has_calls = False
        self._submitted_at = self.started_at = submitted_at
        self._first_at = 0.0
        self._prompt_tokens = 0
        self.is_over = False

    @property
    def label(self) -> str:
        """Its name in the log."""
        return f"request {self.request.id}"

    @property
    def is_cut(self) -> bool:
        """Whether the answer ends here, though the model would continue."""
        return self._answer.is_cut

    def seconds_left(self, now: float) -> float:
        """Return the seconds until the request's deadline, infinite without one."""
        if self.request.deadline_s is None:
            return float("inf")
        return max(self._submitted_at + self.request.deadline_s - now, 0.0)

    def events(self, event: SessionEvent) -> list[GenerationEvent]:
        """Return the generation events for `event`.

        Raises the error of a failed session, and RequestFailed if the answer cannot be read.
        """
        with failing_alone("the processing of its answer", self.label):
            return self._convert(event)

    def _convert(self, event: SessionEvent) -> list[GenerationEvent]:
        match event:
            case Snapshot(text):
                self._first_at = self._first_at or time.monotonic()
                return self._note_calls(self._answer.push(text))
            case ForcedCall(name, arguments):
                self._first_at = time.monotonic()
                return self._note_calls([ToolCallDelta(0, new_call_id(), name, arguments)])
            case Ended(completion_tokens, is_full):
                self.is_over = True
                pieces = self._note_calls(self._answer.flush())
                return [*pieces, self._finished(completion_tokens, is_full=is_full)]
            case Failed(error):
                raise self._after_first_text(error)
        self._prompt_tokens = event.prompt_tokens
        return []

    def _note_calls(self, pieces: Sequence[Piece]) -> list[GenerationEvent]:
        calls = any(isinstance(piece, ToolCallDelta) for piece in pieces)
        self._has_calls = self._has_calls or calls
        return list(pieces)

    def _after_first_text(self, error: ImpetusError) -> ImpetusError:
        """After the first text, convert every error to EngineFailed or RequestFailed."""
        if not self._first_at or isinstance(error, EngineFailed | RequestFailed):
            return error
        return EngineFailed(error.message)

    def _finished(self, completion_tokens: int, *, is_full: bool) -> Finished:
        now = time.monotonic()
        first_at = self._first_at or now
        limit = self.session_request.max_tokens
        reason: FinishReason = "stop"
        if not self.is_cut and (is_full or (limit is not None and completion_tokens >= limit)):
            reason = "length"
        elif self._has_calls:
            reason = "tool_calls"
        timing = Timing(
            queued_s=self.started_at - self._submitted_at,
            prefill_s=first_at - self.started_at,
            decode_s=now - first_at,
        )
        usage = Usage(self._prompt_tokens, completion_tokens)
        answer = self._answer
        return Finished(reason, usage, timing, answer.matched_stop, answer.mismatches)


class _Answer:
    """Converts snapshots to deltas, up to a stop string or the last allowed tool call."""

    def __init__(self, stop: Sequence[str], parser: OutputParser | None) -> None:
        self._stop = StopMatcher(stop)
        self._parser = parser
        self._seen = ""

    @property
    def mismatches(self) -> tuple[MismatchKind, ...]:
        """The kinds of malformed tool calls in the answer."""
        return () if self._parser is None else tuple(self._parser.mismatches)

    @property
    def is_cut(self) -> bool:
        """Whether the answer has ended at a stop string or tool call."""
        return self._stop.is_matched or (self._parser is not None and self._parser.is_done)

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stop.matched or None

    def push(self, snapshot: str) -> list[Piece]:
        """Return the new pieces.  Raises EngineFailed if earlier text has changed."""
        if self.is_cut:
            return []
        if not snapshot.startswith(self._seen):
            raise EngineFailed("Apple's model took back text that it had already sent; try again.")
        new, self._seen = snapshot[len(self._seen) :], snapshot
        return self._parse(self._stop.push(new))

    def flush(self) -> list[Piece]:
        """Return the pieces that were held back; the text ends here."""
        pieces = self._parse(self._stop.flush())
        return pieces if self._parser is None else [*pieces, *self._parser.flush()]

    def _parse(self, text: str) -> list[Piece]:
        if not text:
            return []
        return [TextDelta(text)] if self._parser is None else self._parser.push(text)


def _cancel(session: AppleSession) -> None:
    try:
        session.cancel()
    except Exception:
        logger.exception("a session of Apple's model cannot be cancelled")


def _event_sender(queue: "asyncio.Queue[SessionEvent]") -> Any:
    """Return a callback that passes events from a session's thread to this event loop."""
    loop = asyncio.get_running_loop()

    def send(event: SessionEvent) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, event)
        except RuntimeError:
            logger.debug("the event loop of a request is closed")

    return send
