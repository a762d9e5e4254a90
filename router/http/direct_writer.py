"""Pieces of a streamed body written at once: what ASGI's `send` costs a task for, every token."""

from collections.abc import MutableMapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_KEY = "impetus.direct"


class DirectWriter:
    """Writes to one request's connection without waiting; use on the event loop only."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_ready(self) -> bool:
        """Whether a piece may be written now: begun, not ended, and the client reads."""
        cycle = self._cycle
        return (
            bool(cycle.chunked_encoding)
            and cycle.response_started
            and not (cycle.response_complete or cycle.disconnected or cycle.flow.write_paused)
        )

    def write(self, body: bytes) -> None:
        """Write a piece that is not empty, as one chunk of HTTP/1.1; `is_ready` must hold."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def offer_direct_writer(cycle: RequestResponseCycle) -> None:
    """Let the request's application find a writer."""
    # ASGI lets servers add keys of their own.
    cycle.scope[_KEY] = DirectWriter(cycle)  # type: ignore[literal-required]


def direct_writer(scope: MutableMapping[str, Any]) -> DirectWriter | None:
    """Return the request's writer; None behind a server that is not ours."""
    writer = scope.get(_KEY)
    return writer if isinstance(writer, DirectWriter) else None
