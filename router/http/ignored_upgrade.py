"""Reads the body of a request that offers another protocol, such as Java's `Upgrade: h2c`.

httptools takes the head of such a request for the whole message, so its body is read by a second
parser.  A server may ignore the offer.  Source: RFC 9110, 7.8.
"""

from collections.abc import Iterable
from typing import Protocol

import httptools

_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class ParserCallbacks(Protocol):
    """What httptools calls while it parses requests."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes, /) -> None: ...
    def on_header(self, name: bytes, value: bytes, /) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes, /) -> None: ...
    def on_message_complete(self) -> None: ...


def has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether headers, with names in lower case, announce a body."""
    return any(name in _FRAMING for name, _ in headers)


def body_parser(callbacks: ParserCallbacks) -> httptools.HttpRequestParser:
    """Return a parser that reports nothing of the first head it reads, `framing_head`'s."""
    parser = httptools.HttpRequestParser(_WithoutFirstHead(callbacks))
    # As uvicorn does for the first parser of a connection.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def framing_head(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a head without the offer, after which a parser reads the same body."""
    lines = [name + b": " + value + b"\r\n" for name, value in headers if name in _FRAMING]
    return b"POST / HTTP/1.1\r\n" + b"".join(lines) + b"\r\n"


class _WithoutFirstHead:
    """Passes on what a parser reports, except for the first head."""

    def __init__(self, callbacks: ParserCallbacks) -> None:
        self._callbacks = callbacks
        self._is_past_head = False
        self.on_body = callbacks.on_body
        self.on_message_complete = callbacks.on_message_complete

    def on_message_begin(self) -> None:
        if self._is_past_head:
            self._callbacks.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._is_past_head:
            self._callbacks.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_past_head:
            self._callbacks.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_past_head:
            self._callbacks.on_headers_complete()
        self._is_past_head = True
