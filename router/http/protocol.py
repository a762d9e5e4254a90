"""HTTP/1.1 protocol with limits on size and time, enforced before the application sees a request.

Uses internals of uvicorn's httptools protocol, so it works with the uvicorn version that
`scripts/constraints.txt` pins; `tests/unit/router/http/test_router_protocol.py` fails if another
version changes them.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import ClassVar

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from core.awake_time import AwakeTimer
from core.errors import ImpetusError, RequestError
from core.units import KIB, format_bytes
from router.context import record_of
from router.http.direct_writer import offer_direct_writer
from router.http.errors import error_body, internal_error
from router.http.guards import MAX_HEADER_BYTES, MAX_HEADERS
from router.http.ignored_upgrade import body_parser, framing_head, has_body

_logger = logging.getLogger(__name__)

MAX_TARGET_BYTES = 8 * KIB
MAX_PIPELINED = 64

_HEADERS_MESSAGE = (
    f"The request has more than {MAX_HEADERS} headers or more than "
    f"{format_bytes(MAX_HEADER_BYTES)} of address and headers."
)


_ABSOLUTE_TARGET = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
# More than any answer has; uvicorn subtracts what is sent.
_UNKNOWN_LENGTH = 1 << 62


class _RequestTimeout(RequestError):
    status = 408
    code = "request_timeout"


class _TargetTooLong(RequestError):
    status = 414


class _HeadersTooLarge(RequestError):
    status = 431


class HttpProtocol(HttpToolsProtocol):
    """One client connection with limits on what it may send and how long that may take.

    Limits: `MAX_HEADERS`, `MAX_HEADER_BYTES` (target and trailers included), `MAX_TARGET_BYTES`,
    `MAX_PIPELINED` requests waiting on the connection, `receipt_limit_s` seconds from a request's
    first byte to its last.  An answer may take any time, but a client that reads nothing of it for
    `write_limit_s` seconds is disconnected.  A refused request gets OpenAI's error
    envelope after the pending answers, then the connection is closed.
    """

    receipt_limit_s: ClassVar[float] = 30.0
    write_limit_s: ClassVar[float] = 60.0
    # Long enough for a client that is still sending to read the answer.
    linger_s: ClassVar[float] = 2.0
    _is_in_head = _is_in_body = False
    _head_bytes = 0
    _unparsed_bytes: int | None = None
    _unsent_bytes = 0
    _running: RequestResponseCycle | None = None
    _refused: ImpetusError | None = None
    _is_ending = False
    _receipt_timer: AwakeTimer | None = None
    _write_timer: AwakeTimer | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the keep-alive timer: the first request must begin before it fires."""
        super().connection_made(transport)
        self._start_keep_alive_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the running application; uvicorn does not when requests are pipelined."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_receipt_timer()
        self._stop_write_timer()
        _disconnect(self._running)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; those after a refused request are dropped."""
        if self._refused is not None or self._is_ending:
            return
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest:
                rest = self._parse(rest)
            self._after_read(len(data))
        except httptools.HttpParserError as problem:
            self._refuse(self._reason(problem))
        except RequestError as error:
            self._refuse(error)

    def _parse(self, data: memoryview) -> memoryview:
        try:
            self.parser.feed_data(data)
            return data[:0]
        except httptools.HttpParserUpgrade as upgrade:
            # Upgrades are ignored: the body follows, else the next request.
            if self._is_in_body:
                self.parser = body_parser(self)
                self.parser.feed_data(framing_head(self.headers))
            return data[upgrade.args[0] :]

    def _after_read(self, size: int) -> None:
        if self._is_in_body:
            self.cycle.transport = _LingeringTransport(self.transport, self._linger)
        elif not self._is_in_head:
            if self.cycle is None or self.cycle.response_complete:
                self._start_keep_alive_timer()
            return
        elif self._unparsed_bytes is None:
            # The read that begins a request may contain the end of another.
            self._unparsed_bytes = 0
        else:
            # The parser reports a header only once it is complete.
            self._unparsed_bytes += size
            if self._unparsed_bytes > MAX_HEADER_BYTES:
                raise _HeadersTooLarge(_HEADERS_MESSAGE)
        if self._receipt_timer is None:
            self._start_receipt_timer()

    def _reason(self, problem: Exception) -> ImpetusError:
        if not isinstance(problem, httptools.HttpParserCallbackError):
            return RequestError(f"The request is not valid HTTP: {problem}.")
        # The parser stores the exception of a callback as the context.
        cause = problem.__context__
        if isinstance(cause, ImpetusError):
            return cause
        if isinstance(cause, httptools.HttpParserInvalidURLError):
            return RequestError("The request is not valid HTTP: invalid address.")
        _logger.error("internal error while parsing a request", exc_info=cause or problem)
        return internal_error(record_of(dict(self.scope)))

    def on_message_begin(self) -> None:
        """Reset the header counters."""
        super().on_message_begin()
        self._is_in_head = True
        self._head_bytes = 0
        self._unparsed_bytes = None

    def on_url(self, url: bytes) -> None:
        """Count a piece of the target.  Raises at the limit."""
        super().on_url(url)
        self._head_bytes += len(url)
        if self._head_bytes > MAX_TARGET_BYTES:
            limit = format_bytes(MAX_TARGET_BYTES)
            raise _TargetTooLong(f"The request's address is longer than {limit}.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header.  Raises at the limits.  Trailers are dropped."""
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEADER_BYTES or len(self.headers) >= MAX_HEADERS:
            raise _HeadersTooLarge(_HEADERS_MESSAGE)
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Dispatch the request.  Raises for one that must not reach the application."""
        self._check_framing()
        self._adopt_target_host()
        if not self.url.startswith(b"/") and not httptools.parse_url(self.url).path:
            raise RequestError("The request is not valid HTTP: the address has no path.")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise RequestError(
                f"More than {MAX_PIPELINED} requests wait on this connection; read answers first."
            )
        super().on_headers_complete()
        self._is_in_head, self._is_in_body = False, True

    def _adopt_target_host(self) -> None:
        """Let the host of an absolute target replace the Host header, which guards then check.

        Source: RFC 9112, 3.2.2.
        """
        match = _ABSOLUTE_TARGET.match(self.url)
        places = [place for place, (name, _) in enumerate(self.headers) if name == b"host"]
        # Requests with no Host header, or with several, are refused later.
        if match is not None and len(places) == 1:
            self.headers[places[0]] = (b"host", match[1])

    def _check_framing(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise RequestError(f"HTTP/{version} is not supported; send HTTP/1.1.")
        if self.parser.get_method() == b"CONNECT":
            raise RequestError("This server is no proxy: the method CONNECT is not supported.")
        for name, value in self.headers:
            is_coded = name == b"transfer-encoding"
            if is_coded and (version == "1.0" or value.strip().lower() != b"chunked"):
                raise RequestError("The request is not valid HTTP: invalid Transfer-Encoding.")

    def on_message_complete(self) -> None:
        """Stop the receipt timer: the request is complete."""
        # The parser ends the message here, although its body is still to come.
        if self.parser.should_upgrade() and has_body(self.headers):
            return
        super().on_message_complete()
        self._is_in_body = False
        self._stop_receipt_timer()
        self.cycle.transport = self.transport

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        offer_direct_writer(cycle)
        if cycle.scope["http_version"] == "1.0":
            cycle.waiting_for_100_continue = False
            app = _without_chunks(cycle, app)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Start the connection's next request, or send a pending refusal."""
        if self._is_ending:
            return
        if self._refused is not None and not self.pipeline and not self.transport.is_closing():
            self._send_refusal(self._refused)
            return
        super().on_response_complete()

    def _refuse(self, error: ImpetusError) -> None:
        """Stop reading, and answer with `error` after the answers before it are sent."""
        self._refused = error
        self._stop_receipt_timer()
        broken = self.cycle if self._is_in_body else None
        if self.pipeline and self.pipeline[0][0] is broken:
            self.pipeline.popleft()
        running = self._running
        if running is not None and running is not broken and not running.response_complete:
            return
        _disconnect(broken)
        if self.transport.is_closing() or (broken is not None and broken.response_started):
            self._linger()
        else:
            self._send_refusal(error)

    def _send_refusal(self, error: ImpetusError) -> None:
        body = error_body(error)
        request_id = record_of(dict(self.scope)).request_id
        lines = (
            b"HTTP/1.1 %d %s" % (error.status, HTTPStatus(error.status).phrase.encode("ascii")),
            *(name + b": " + value for name, value in self.server_state.default_headers),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
            b"x-request-id: " + request_id.encode("ascii"),
        )
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        _logger.info("refused: %s", error.message, extra={"request_id": request_id})
        self._linger()

    def _start_keep_alive_timer(self) -> None:
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            late = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, late)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, but not while its client still reads the last answer."""
        self.timeout_keep_alive_task = None
        unsent = self.transport.get_write_buffer_size()
        if unsent in (0, self._unsent_bytes):
            self.transport.abort()
        else:
            self._unsent_bytes = unsent
            self._start_keep_alive_timer()

    def pause_writing(self) -> None:
        """Wait for a client that reads slower than it is sent to; one that stops reading is cut."""
        super().pause_writing()
        self._await_progress()

    def resume_writing(self) -> None:
        """Go on: the client has read most of what it was sent."""
        super().resume_writing()
        self._stop_write_timer()

    def _await_progress(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._write_timer = AwakeTimer(self.write_limit_s, self._check_progress, unsent)

    def _check_progress(self, unsent_before: int) -> None:
        if self.transport.get_write_buffer_size() < unsent_before:
            self._await_progress()
        else:
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_receipt_timer(self) -> None:
        self._receipt_timer = AwakeTimer(self.receipt_limit_s, self._on_late_receipt)

    def _stop_receipt_timer(self) -> None:
        if self._receipt_timer is not None:
            self._receipt_timer.cancel()
            self._receipt_timer = None

    def _on_late_receipt(self) -> None:
        if self.flow.read_paused:
            # This side has paused reading.
            self._start_receipt_timer()
        else:
            limit = f"{self.receipt_limit_s:g} s"
            self._refuse(_RequestTimeout(f"The request did not arrive completely within {limit}."))

    def _linger(self) -> None:
        """Send EOF, then discard input until the client closes or `linger_s` passes.

        Closing a socket with unread bytes resets the connection, and the answer would be lost.
        """
        self._is_ending = True
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.flow.resume_reading()
            self.loop.call_later(self.linger_s, self.transport.abort)


class _LingeringTransport(asyncio.Transport):
    """Transport of an answer that may end before its request has been received."""

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], None]) -> None:
        super().__init__()
        self._transport = transport
        self._linger = linger

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._linger()


def _without_chunks(cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
    """Return `app` for an HTTP/1.0 client: a body of unknown length ends with the connection."""

    async def plain_app(scope: Scope, receive: Receive, send: Send) -> None:
        async def plain_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                if b"content-length" not in names and scope["method"] != "HEAD":
                    cycle.chunked_encoding = False
                    cycle.expected_content_length = _UNKNOWN_LENGTH
            elif cycle.expected_content_length > _UNKNOWN_LENGTH // 2 and not message.get(
                "more_body", False
            ):
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, plain_send)  # type: ignore[arg-type]

    return plain_app  # type: ignore[return-value]


def _disconnect(cycle: RequestResponseCycle | None) -> None:
    """Make the application of `cycle` see a client disconnect."""
    if cycle is not None and not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()
