"""`GET /api/events`: the stream of what happens; `GET /api/state`: all of it at one moment."""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.api.answer import Endpoint, answer
from router.context import server_send
from router.events.hub import EventHub, EventReader
from router.requests.query import Query, read_query

KEEP_ALIVE_S = 10.0
# After this the stream ends, so that the credentials of its client are checked again.
LIFETIME_S = 3600.0
_BEGINNING = "retry: 2000\n\n"
_KEEP_ALIVE = ": keep-alive\n\n"
_LONGEST_ID = 64


class EventsQuery(Query):
    """The event after which the stream begins, for clients that cannot send `Last-Event-ID`."""

    last_event_id: Annotated[str, Field(max_length=_LONGEST_ID)] = ""


def events_endpoint(
    hub: EventHub, *, keep_alive_s: float = KEEP_ALIVE_S, lifetime_s: float = LIFETIME_S
) -> Endpoint:
    """Return the handler of the stream.

    The header wins over the query: `EventSource` sends it when it connects again, with the query
    of the first time.
    """

    async def stream_events(request: Request) -> Response:
        query = read_query(request, EventsQuery)
        last_id = request.headers.get("last-event-id", "")[:_LONGEST_ID] or query.last_event_id
        return _EventStream(hub.reader(last_id), keep_alive_s, lifetime_s)

    return stream_events


def state_endpoint(hub: EventHub) -> Endpoint:
    """Return the handler of the state."""

    async def show_state(request: Request) -> Response:
        del request
        return answer(await hub.state())

    return show_state


class _EventStream(Response):
    """Sends events until the client disconnects, the server stops, or the lifetime is over."""

    def __init__(
        self,
        reader: EventReader,
        keep_alive_s: float,
        lifetime_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._reader = reader
        self._keep_alive_s = keep_alive_s
        self._end = clock() + lifetime_s
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream; a write blocks as long as the client does not read, up to the server's limit."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        writing = asyncio.create_task(self._write(server_send(scope, send)))
        watching = asyncio.create_task(_until_disconnected(receive))
        try:
            await asyncio.wait((writing, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            writing.cancel()
            watching.cancel()
            results = await asyncio.gather(writing, watching, return_exceptions=True)
        for result in results:
            # An OSError is that of a connection which is gone.
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result

    async def _write(self, send: Send) -> None:
        async def write(text: str, *, more_body: bool = True) -> None:
            body = text.encode()
            await send({"type": "http.response.body", "body": body, "more_body": more_body})

        with self._reader as reader:
            text = _BEGINNING + reader.take()
            while not reader.has_ended and self._clock() < self._end:
                if text:
                    await write(text)
                    text = reader.take()
                    continue
                await reader.wait(min(self._keep_alive_s, max(self._end - self._clock(), 0.0)))
                text = reader.take() or _KEEP_ALIVE
            await write(text, more_body=False)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
