"""The event stream: events as they come, keep-alives while nothing does, errors, the end."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core.errors import EngineFailed, ImpetusError
from core.types import PrefillProgress
from router.answers.event_feed import EventFeed, TaggedEvent
from router.answers.generation import Generation
from router.context import Pacing, RequestRecord, record_of, server_send
from router.http.direct_writer import DirectWriter, direct_writer
from router.http.errors import internal_error

_logger = logging.getLogger(__name__)

KEEP_ALIVE = ": keep-alive\n\n"


def prefill_comment(event: PrefillProgress) -> str:
    """Return the comment line that tells how much of a prompt is computed."""
    return f": prefill {event.done_tokens}/{event.total_tokens}\n\n"


class StreamFormatter(ABC):
    """Events → the SSE text of one API; used by one stream, called in the order of its methods."""

    keep_alive = KEEP_ALIVE

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def beginning(self, events: Sequence[TaggedEvent]) -> str:
        """Return what precedes everything else; `events` are the first, to be said next."""
        del events
        return ""

    @abstractmethod
    def chunks(self, events: Sequence[TaggedEvent]) -> str:
        """Return the SSE text of `events`."""

    @abstractmethod
    def closing(self) -> str:
        """Return what ends a stream that has said everything."""

    @abstractmethod
    def failing(self, error: ImpetusError, record: RequestRecord) -> str:
        """Return what ends a stream that fails after its headers."""


class _KeepAlive:
    """Wakes the feed when the stream was silent, and gives up on a client that does not read."""

    def __init__(self, feed: EventFeed, pacing: Pacing, send: Send) -> None:
        self._feed = feed
        self._send = send
        self._pacing = pacing
        self._loop = asyncio.get_running_loop()
        self._began_at = self._written_at = self._loop.time()
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
        """Begin a new silence."""
        self.is_due = False
        self._written_at = self._loop.time()

    def stop(self) -> None:
        """End the ticking."""
        self._timer.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        silent_s = now - self._written_at
        if self._is_writing and silent_s >= self._pacing.write_timeout_s:
            self._feed.abort(EngineFailed("The client did not read the stream."))
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
    """Streams a generation.

    An error before the first token, or before `Pacing.header_wait_s`, is raised, to become an
    HTTP status; a later one is said in the stream.  A client that leaves ends the
    generation at once.
    """

    def __init__(self, generation: Generation, formatter: StreamFormatter) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **generation.headers},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._generation = generation
        self._formatter = formatter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, an error, or the client's leaving."""
        async with EventFeed(self._generation.runs(), receive) as feed:
            body_send = server_send(scope, send)
            keep_alive = _KeepAlive(feed, self._generation.context.pacing, body_send)
            if (writer := direct_writer(scope)) is not None:
                feed.shortcut = partial(self._say_at_once, writer, keep_alive)
            try:
                await self._stream(feed, keep_alive, send, record_of(scope))
            finally:
                keep_alive.stop()

    async def _stream(
        self, feed: EventFeed, keep_alive: _KeepAlive, send: Send, record: RequestRecord
    ) -> None:
        text = await self._beginning(feed, keep_alive)
        if feed.is_disconnected:
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while True:
                # The last events and what closes the stream go as one message.
                if text and not feed.has_ended:
                    said, text = text, ""
                    await keep_alive.write(said)
                events = await feed.next()
                if events is None:
                    break
                text += self._say(events, keep_alive)
            if not feed.is_disconnected:
                text += self._formatter.closing()
        except Exception as error:
            text += self._in_stream_error(error, record)
        if not feed.is_disconnected:
            await keep_alive.write(text, more_body=False)

    async def _beginning(self, feed: EventFeed, keep_alive: _KeepAlive) -> str:
        """Wait for the first token, or until it is time to send the headers without it."""
        first: list[TaggedEvent] = []
        while (events := await feed.next()) is not None:
            first += events
            if _has_tokens(events):
                self._generation.note_first_token()
                break
            if keep_alive.is_due:
                break
        text = self._formatter.beginning(first) + self._formatter.chunks(first)
        return text or self._formatter.keep_alive

    def _say(self, events: Sequence[TaggedEvent], keep_alive: _KeepAlive) -> str:
        if not events:
            return self._formatter.keep_alive if keep_alive.is_due else ""
        if self._generation.awaits_first_token and _has_tokens(events):
            self._generation.note_first_token()
        return self._formatter.chunks(events)

    def _say_at_once(
        self, writer: DirectWriter, keep_alive: _KeepAlive, events: Sequence[TaggedEvent]
    ) -> bool:
        """Write later tokens' text where that needs no waiting; return whether it was done."""
        if self._generation.awaits_first_token or not writer.is_ready:
            return False
        if text := self._formatter.chunks(events):
            writer.write(text.encode("ascii"))
            keep_alive.note_written()
        return True

    def _in_stream_error(self, error: Exception, record: RequestRecord) -> str:
        if isinstance(error, ImpetusError):
            known = error
        else:
            _logger.error("internal error", exc_info=error, extra={"request_id": record.request_id})
            known = internal_error(record)
        self._generation.context.metrics.errors.labels(known.code).inc()
        return self._formatter.failing(known, record)
