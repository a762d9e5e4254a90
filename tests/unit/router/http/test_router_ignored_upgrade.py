"""Offers of another protocol are ignored and the request is served, with its body, as it stands."""

import asyncio
import json

import pytest

from router.app import create_app
from router.http.protocol import HttpProtocol
from tests.fakes import CHAT_MODEL, FakeDispatcher, make_services
from tests.live_server import connection, exchange, serving, to_end, until
from tests.unit.router.http.test_router_protocol import App, assert_refusal

HOST = b"Host: localhost\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
LAST_GET = b"GET /last HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
WEBSOCKET = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"


class Hurried(HttpProtocol):
    receipt_limit_s = 0.2


def post(ask: bytes, body: bytes, *, is_chunked: bool = False, path: bytes = b"/") -> bytes:
    """Return a raw POST of JSON."""
    framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    head = b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
    sent = b"%x\r\n%b\r\n0\r\nX-Trailer: a\r\n\r\n" % (len(body), body) if is_chunked else body
    return head + ask + framing + b"\r\n\r\n" + sent


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("ask", [H2C, WEBSOCKET])
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_chat_request_with_an_offer_is_answered(
    ask: bytes, is_chunked: bool, is_streamed: bool
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps({"model": CHAT_MODEL, "messages": messages, "stream": is_streamed}).encode()
    dispatcher = FakeDispatcher()
    request = post(ask, body, is_chunked=is_chunked, path=b"/v1/chat/completions")
    async with serving(create_app(make_services(dispatcher))) as port:
        status, answer = await exchange(port, request + LAST_GET)
    assert status == 200
    assert b"Hello" in answer
    assert len(dispatcher.requests) == 1


# The body is itself a request: it must never be read as one.
@pytest.mark.parametrize(
    ("body", "is_chunked"),
    [(GET, False), (GET, True), (b"", False), (b"a" * 200_000, False), (b"a" * 200_000, True)],
)
async def test_body_is_read_once_and_further_requests_follow_on_the_connection_n16(
    body: bytes, is_chunked: bool
) -> None:
    app = App()
    request = post(H2C, body, is_chunked=is_chunked)
    async with serving(app) as port:
        status, answer = await exchange(port, request + request + GET + request + LAST_GET)
    assert status == 200
    assert app.bodies == [body, body, b"", body, b""]
    assert answer.count(b"HTTP/1.1 200 ") == 5
    assert [scope["path"] for scope in app.scopes] == ["/", "/", "/", "/", "/last"]
    assert [name for name, _ in app.scopes[0]["headers"]].count(b"x-trailer") == 0


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_request_with_an_offer_may_arrive_in_any_pieces(is_chunked: bool) -> None:
    request = post(H2C, b'{"a": 1}', is_chunked=is_chunked)
    for size in (1, 2, 7, 50):
        app = App()
        async with serving(app) as port, connection(port) as (reader, writer):
            for offset in range(0, len(request), size):
                writer.write(request[offset : offset + size])
                await writer.drain()
                await asyncio.sleep(0)
            assert b"<8>" in await until(reader, b"0\r\n\r\n")
            writer.write(LAST_GET)
            assert (await to_end(reader)).startswith(b"HTTP/1.1 200 ")
        assert app.bodies == [b'{"a": 1}', b""]


async def test_offer_without_a_body_is_ignored_and_the_connection_goes_on() -> None:
    app = App()
    async with serving(app) as port, connection(port) as (reader, writer):
        for ask in (H2C, WEBSOCKET):
            writer.write(b"GET /a HTTP/1.1\r\n" + HOST + ask + b"\r\n" + GET)
            assert (await until(reader, b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert (await until(reader, b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    assert [scope["path"] for scope in app.scopes] == ["/a", "/", "/a", "/"]


async def test_offer_and_close_ends_the_connection_after_the_answer() -> None:
    ask = b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n"
    async with serving(App()) as port:
        _, answer = await exchange(port, post(ask, b"{}") + GET)
    assert answer.count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
    ],
)
async def test_offer_does_not_make_a_wrong_framing_right_n16(framing: bytes) -> None:
    app = App()
    head = b"POST / HTTP/1.1\r\n" + HOST + H2C + framing + b"\r\n"
    async with serving(app) as port:
        _, answer = await exchange(port, head + b"abc" + GET)
    assert_refusal(answer, 400)
    assert app.bodies == []


async def test_connect_with_a_body_is_refused_n16() -> None:
    app = App()
    async with serving(app) as port:
        for target in (b"localhost:1", b"/"):
            ask = b"CONNECT " + target + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc"
            _, answer = await exchange(port, ask + GET)
            assert_refusal(answer, 400)
    assert app.scopes == []


async def test_wrong_chunk_after_an_offer_ends_the_request_and_the_connection_n16() -> None:
    app = App()
    head = b"POST / HTTP/1.1\r\n" + HOST + H2C + b"Transfer-Encoding: chunked\r\n\r\n"
    async with serving(app) as port:
        _, answer = await exchange(port, head + b"zz\r\nabc\r\n0\r\n\r\n" + GET)
    assert "not valid HTTP" in assert_refusal(answer, 400)
    assert app.bodies == []


async def test_body_after_an_offer_that_never_ends_is_refused_in_time_n14() -> None:
    async with serving(App(), protocol=Hurried) as port:
        _, answer = await exchange(port, post(H2C, b"12345")[:-1])
    assert_refusal(answer, 408, "request_timeout")


async def test_body_after_an_offer_counts_against_the_limit() -> None:
    app = create_app(make_services(max_body=1000))
    for is_chunked in (False, True):
        body = b'{"model": "' + b"a" * 5000 + b'"}'
        request = post(H2C, body, is_chunked=is_chunked, path=b"/v1/chat/completions")
        async with serving(app) as port:
            status, _ = await exchange(port, request)
        assert status == 413
