"""The event stream: chunks as they come, comments while nothing does, errors, the end."""

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core.errors import EngineFailed, ImpetusError
from core.types import Finished, GenerationEvent, JsonValue, PrefillProgress, TextDelta
from router.context import Pacing, RequestRecord, record_of, server_send
from router.errors import error_body, internal_error
from router.v1.feed import EventFeed, TaggedEvent
from router.v1.generation import Generation

_logger = logging.getLogger(__name__)

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"
_MARK = "\0text\0"

_dumps = json.JSONEncoder(separators=(",", ":")).encode


class ChunkFormatter(ABC):
    """Events → SSE text.  The plain text delta, by far the commonest, is one concatenation."""

    def __init__(
        self,
        generation: Generation,
        base: dict[str, Any],
        *,
        includes_usage: bool,
        has_logprobs: bool,
    ) -> None:
        self._generation = generation
        self._base = {**base, "usage": None} if includes_usage else base
        self._includes_usage = includes_usage
        self._has_logprobs = has_logprobs
        self._opened: set[int] = set()
        self._frames: dict[int, tuple[str, str]] = {}

    @abstractmethod
    def choices(self, index: int, event: GenerationEvent) -> Iterable[dict[str, JsonValue]]:
        """Return the choice objects that say `event`; none for nothing to say."""

    def opening(self, index: int) -> Iterable[dict[str, JsonValue]]:
        """Return the choice objects that come before a choice's first event."""
        del index
        return ()

    def chunks(self, events: Sequence[TaggedEvent]) -> str:
        """Return the SSE text of `events`."""
        parts: list[str] = []
        for index, event in events:
            frame = self._frames.get(index)
            if frame is None or type(event) is not TextDelta:
                parts.append(self._uncommon(index, event))
            elif event.text:
                parts.append(f"{frame[0]}{_dumps(event.text)}{frame[1]}")
        return "".join(parts)

    def closing(self) -> str:
        """Return the usage chunk, if asked for, and the end mark."""
        if not self._includes_usage:
            return DONE
        usage = self._generation.usage().model_dump(mode="json", exclude_unset=True)
        last = {**self._base, "usage": usage, "timing": self._generation.timing()}
        return f"data: {_dumps(last)}\n\n{DONE}"

    def _uncommon(self, index: int, event: GenerationEvent) -> str:
        if isinstance(event, PrefillProgress):
            return f": prefill {event.done_tokens}/{event.total_tokens}\n\n"
        if isinstance(event, Finished):
            self._generation.note_finished(index, event)
        text = ""
        if index not in self._opened:
            self._opened.add(index)
            text = "".join(map(self._chunk, self.opening(index)))
            if not self._has_logprobs:
                (choice,) = self.choices(index, TextDelta(_MARK))
                prefix, suffix = self._chunk(choice).split(_dumps(_MARK))
                self._frames[index] = (prefix, suffix)
        return text + "".join(map(self._chunk, self.choices(index, event)))

    def _chunk(self, choice: dict[str, JsonValue]) -> str:
        return f"data: {_dumps({**self._base, 'choices': [choice]})}\n\n"


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
        self.is_due = False
        self._is_writing = True
        self._written_at = self._loop.time()
        body = text.encode("ascii")
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more_body})
        except OSError:
            self._feed.is_disconnected = True
        self._is_writing = False

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
    HTTP status; a later one is a `data: {"error": …}` line.  A client that leaves ends the
    generation at once.
    """

    def __init__(self, generation: Generation, formatter: ChunkFormatter) -> None:
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
                if text:
                    await keep_alive.write(text)
                events = await feed.next()
                if events is None:
                    break
                text = self._say(events, keep_alive)
            text = self._formatter.closing()
        except Exception as error:
            text = self._in_stream_error(error, record)
        if not feed.is_disconnected:
            await keep_alive.write(text, more_body=False)

    async def _beginning(self, feed: EventFeed, keep_alive: _KeepAlive) -> str:
        """Wait for the first token, or until it is time to send the headers without it."""
        text = ""
        while (events := await feed.next()) is not None:
            text += self._formatter.chunks(events)
            if _has_tokens(events):
                self._generation.note_first_token()
                return text
            if keep_alive.is_due:
                return text or KEEP_ALIVE
        return text

    def _say(self, events: Sequence[TaggedEvent], keep_alive: _KeepAlive) -> str:
        if not events:
            return KEEP_ALIVE if keep_alive.is_due else ""
        if self._generation.awaits_first_token and _has_tokens(events):
            self._generation.note_first_token()
        return self._formatter.chunks(events)

    def _in_stream_error(self, error: Exception, record: RequestRecord) -> str:
        if isinstance(error, ImpetusError):
            known = error
        else:
            _logger.error("internal error", exc_info=error, extra={"request_id": record.request_id})
            known = internal_error(record)
        self._generation.context.metrics.errors.labels(known.code).inc()
        return f"data: {error_body(known).decode('ascii')}\n\n{DONE}"
