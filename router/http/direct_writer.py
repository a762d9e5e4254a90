"""Writes stream chunks straight to the transport; ASGI `send` costs a task switch per token."""

from collections.abc import MutableMapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_KEY = "impetus.direct"


class DirectWriter:
    """Writes to one request's connection without blocking; use on the event loop only."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_ready(self) -> bool:
        """Whether a chunk may be written now: headers are sent, and the client still reads."""
        cycle = self._cycle
        return (
            bool(cycle.chunked_encoding)
            and cycle.response_started
            and not (cycle.response_complete or cycle.disconnected or cycle.flow.write_paused)
        )

    def write(self, body: bytes) -> None:
        """Write a non-empty `body` as one HTTP/1.1 chunk; `is_ready` must be true."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def offer_direct_writer(cycle: RequestResponseCycle) -> None:
    """Make a writer available in the request's scope."""
    # ASGI allows servers to add keys of their own.
    cycle.scope[_KEY] = DirectWriter(cycle)  # type: ignore[literal-required]


def direct_writer(scope: MutableMapping[str, Any]) -> DirectWriter | None:
    """Return the request's writer; None behind another server than `HttpProtocol`."""
    writer = scope.get(_KEY)
    return writer if isinstance(writer, DirectWriter) else None
