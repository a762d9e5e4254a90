"""Streams server-sent events: text as it is generated, keep-alives during silence, errors."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core.errors import EngineFailed, ImpetusError
from core.types import PrefillProgress
from router.answers.event_feed import EventFeed
from router.answers.generation import Generation
from router.answers.valid_events import TaggedEvent
from router.context import Pacing, RequestRecord, record_of, server_send
from router.http.direct_writer import DirectWriter, direct_writer
from router.http.errors import error_body, internal_error

_logger = logging.getLogger(__name__)

KEEP_ALIVE = ": keep-alive\n\n"


def prefill_comment(event: PrefillProgress) -> str:
    """Return the comment line that reports prefill progress in tokens; empty at its end."""
    if event.done_tokens == event.total_tokens:
        return ""
    return f": prefill {event.done_tokens}/{event.total_tokens}\n\n"


class StreamFormatter(ABC):
    """Formats events as the SSE text of one API; one instance per stream, called in this order."""

    keep_alive = KEEP_ALIVE

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def beginning(self, events: Sequence[TaggedEvent]) -> str:
        """Return the text before all other; `events` are the first, which `chunks` gets next."""
        del events
        return ""

    @abstractmethod
    def chunks(self, events: Sequence[TaggedEvent]) -> str:
        """Return the SSE text of `events`."""

    @abstractmethod
    def closing(self) -> str:
        """Return the end of a complete stream."""

    @abstractmethod
    def failing(self, error: ImpetusError, record: RequestRecord) -> str:
        """Return the end of a stream that fails after its headers."""


class _KeepAlive:
    """Writes the stream; wakes its reader after a silence, aborts if the client stops reading."""

    def __init__(self, feed: EventFeed, pacing: Pacing, send: Send) -> None:
        self._feed = feed
        self._send = send
        self._pacing = pacing
        self._loop = asyncio.get_running_loop()
        # Not the loop's clock, which goes on while a Mac sleeps and nobody could read.
        self._began_at = self._written_at = time.monotonic()
        self._is_writing = False
        self._interval_s = pacing.header_wait_s
        self._timer = self._loop.call_later(self._interval_s, self._tick)
        self.is_due = False

    async def write(self, text: str, *, more_body: bool = True) -> None:
        """Send one body message; may block as long as the client does not read."""
        self.note_written()
        self._is_writing = True
        body = text.encode("ascii")
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more_body})
        except OSError:
            self._feed.is_disconnected = True
        self._is_writing = False

    def note_written(self) -> None:
        """Restart the silence timer."""
        self.is_due = False
        self._written_at = time.monotonic()

    def stop(self) -> None:
        """Cancel the timer."""
        self._timer.cancel()

    def _tick(self) -> None:
        now = time.monotonic()
        silent_s = now - self._written_at
        if self._is_writing and silent_s >= self._pacing.write_timeout_s:
            self._feed.abort(
                EngineFailed(
                    "The client stopped reading the stream, so the generation was cancelled."
                )
            )
            return
        # Half of the interval, since the last write may have come just after the last tick.
        if not self._is_writing and silent_s >= self._interval_s / 2:
            self.is_due = True
            self._feed.wake()
        is_early = now - self._began_at < self._pacing.calm_after_s
        self._interval_s = (
            self._pacing.early_keep_alive_s if is_early else self._pacing.late_keep_alive_s
        )
        self._timer = self._loop.call_later(self._interval_s, self._tick)


def _has_tokens(events: Sequence[TaggedEvent]) -> bool:
    return any(not isinstance(event, PrefillProgress) for _, event in events)


class EventStream(Response):
    """Streams a generation as server-sent events; answers one request.

    An error before the first token, or before `Pacing.header_wait_s`, is raised and becomes an
    HTTP status; a later one is sent as the stream's last event.  A client that disconnects ends the
    generation at once.
    """

    _feed: EventFeed
    _keep_alive: _KeepAlive
    _direct: DirectWriter | None = None

    def __init__(self, generation: Generation, formatter: StreamFormatter) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **generation.headers},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._generation = generation
        self._formatter = formatter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, an error, or the client's disconnect."""
        async with self._generation.run(receive) as self._feed:
            pacing = self._generation.context.pacing
            self._keep_alive = _KeepAlive(self._feed, pacing, server_send(scope, send))
            self._direct = direct_writer(scope)
            if self._direct is not None:
                self._feed.write_now = self._write_now
            try:
                await self._stream(send, record_of(scope))
            finally:
                self._keep_alive.stop()

    async def _stream(self, send: Send, record: RequestRecord) -> None:
        feed = self._feed
        text = await self._first_text()
        if feed.is_disconnected:
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while True:
                # The last events and the end of the stream are sent as one message.
                if text and not feed.has_ended:
                    unsent, text = text, ""
                    await self._keep_alive.write(unsent)
                events = await feed.next()
                if events is None:
                    break
                text += self._text(events)
            if not feed.is_disconnected:
                text += self._formatter.closing()
        except Exception as error:
            text += self._error_text(error, record)
        if not feed.is_disconnected:
            await self._keep_alive.write(text, more_body=False)

    async def _first_text(self) -> str:
        """Wait for the first token, or until it is time to send the headers without it."""
        first: list[TaggedEvent] = []
        while (events := await self._feed.next()) is not None:
            first += events
            if _has_tokens(events):
                self._generation.note_first_token()
                break
            if self._keep_alive.is_due:
                break
        text = self._formatter.beginning(first) + self._formatter.chunks(first)
        return text or self._formatter.keep_alive

    def _text(self, events: Sequence[TaggedEvent]) -> str:
        if not events:
            return self._formatter.keep_alive if self._keep_alive.is_due else ""
        if self._generation.awaits_first_token and _has_tokens(events):
            self._generation.note_first_token()
        return self._formatter.chunks(events)

    def _write_now(self, events: Sequence[TaggedEvent]) -> bool:
        """Write tokens after the first if the socket accepts them; return whether it did."""
        direct = self._direct
        if direct is None or self._generation.awaits_first_token or not direct.is_ready:
            return False
        if text := self._formatter.chunks(events):
            direct.write(text.encode("ascii"))
            self._keep_alive.note_written()
        return True

    def _error_text(self, error: Exception, record: RequestRecord) -> str:
        if isinstance(error, ImpetusError):
            known = error
        else:
            _logger.error("internal error", exc_info=error, extra={"request_id": record.request_id})
            known = internal_error(record)
        self._generation.context.metrics.errors.labels(known.code).inc()
        try:
            return self._formatter.failing(known, record)
        except Exception:
            # A stream must end, even if a part of the answer cannot be formatted.
            _logger.exception("cannot format an error", extra={"request_id": record.request_id})
            return f"event: error\ndata: {error_body(known).decode('ascii')}\n\n"
