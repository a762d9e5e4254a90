"""The HTTP protocol on raw sockets: what is refused, how, when, and what stays untouched.

These tests also pin the internals of uvicorn and httptools that `router.http.protocol` builds on.
"""

import asyncio
import inspect
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from starlette.types import Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from router.app import create_app
from router.http.protocol import MAX_PIPELINED, HttpProtocol
from tests.fakes import CHAT_MODEL, make_services
from tests.live_server import (
    connection,
    exchange,
    post_bytes,
    serving,
    to_end,
    until,
)

HOST = b"Host: localhost\r\n"
CHUNKED = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
FIRST_HALF = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\n12345"


class Hurried(HttpProtocol):
    receipt_limit_s = 0.2


class Abrupt(HttpProtocol):
    linger_s = 0.2


class Unresting(HttpProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.timeout_keep_alive = 0.2  # type: ignore[assignment]
        super().connection_made(transport)


class App:
    """Reads each request whole, waits for its gate and says how long the body was."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []
        self.began = asyncio.Event()
        self.left = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.began.set()
        body, message = b"", await receive()
        while message["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
            message = await receive()
        else:
            self.left.set()
            return
        self.bodies.append(body)
        await self._wait_or_see_the_client_leave(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"<%d>" % len(body)})

    async def _wait_or_see_the_client_leave(self, receive: Receive) -> None:
        if self.gate.is_set():
            return
        waits = [asyncio.ensure_future(receive()), asyncio.ensure_future(self.gate.wait())]
        done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        if waits[0] in done:
            self.left.set()


async def send_for_ever(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"a" * 1000)
        await writer.drain()
        await asyncio.sleep(0)


def assert_refusal(answer: bytes, status: int, code: str = "invalid_request") -> str:
    """Check that `answer` is exactly one refusal in the envelope, and return its message."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    assert lines[0].startswith(f"HTTP/1.1 {status} ")
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert headers["content-length"] == str(len(body))
    assert headers["x-request-id"].startswith("req_")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    return str(error["message"])


@asynccontextmanager
async def expiry(port: int) -> AsyncIterator[None]:
    """Run the block, then wait until a receipt limit that began after it has passed."""
    yield
    _, answer = await exchange(port, b"G")
    assert_refusal(answer, 408, "request_timeout")


def test_uvicorn_still_has_the_parts_that_the_protocol_builds_on() -> None:
    config = Config(App, http=HttpProtocol, ws="none", log_config=None)
    loop = asyncio.new_event_loop()
    protocol = HttpProtocol(config, ServerState(), {}, loop)
    loop.close()
    parts = (
        "_start_asgi_task _unset_keepalive_if_required connections cycle flow headers loop "
        "on_response_complete parser pause_writing pipeline resume_writing scope server_state "
        "timeout_keep_alive "
        "timeout_keep_alive_handler timeout_keep_alive_task transport"
    )
    missing = [name for name in parts.split() if not hasattr(protocol, name)]
    assert not missing, f"uvicorn's HttpToolsProtocol changed: {missing} are gone"
    source = inspect.getsource(RequestResponseCycle)
    for part in ("chunked_encoding", "expected_content_length", "waiting_for_100_continue"):
        assert f"self.{part}" in source, f"uvicorn's RequestResponseCycle changed: no {part}"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999999999999\r\n\r\nabc",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\nabc",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X : a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X: a\rb\r\n\r\n",
        b"GET / HTTP/1.1\nHost: localhost\n\n",
        b"GET / HTTP/1.7\r\n" + HOST + b"\r\n",
        b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://localhost HTTP/1.1\r\n" + HOST + b"\r\n",
        b"CONNECT localhost:1 HTTP/1.1\r\n" + HOST + b"\r\n",
        b"get / HTTP/1.1\r\n" + HOST + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_request_that_is_not_valid_is_refused_and_never_dispatched_n16(
    request_bytes: bytes,
) -> None:
    app = App()
    async with serving(app) as port:
        _, answer = await exchange(port, request_bytes + GET)
    assert_refusal(answer, 400)
    assert app.scopes == []


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"-1\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabcde\r\n0\r\n\r\n",
        b"3\nabc\n0\n\n",
        b"3\r\nabc\r\n0\r\nX : a\r\n\r\n",
    ],
)
async def test_chunk_that_is_not_valid_ends_the_request_and_the_connection_n16(
    chunks: bytes,
) -> None:
    app = App()
    async with serving(app) as port:
        _, answer = await exchange(port, CHUNKED + chunks + GET)
        await asyncio.wait_for(app.left.wait(), 30)
    assert "not valid HTTP" in assert_refusal(answer, 400)
    assert len(app.scopes) == 1
    assert app.bodies == []


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ([b"GET / HTTP/1.1\r\nX: ", *[b"a" * 8000] * 2000], 431),
        ([b"GET / HTTP/1.1\r\n", *[b"X: " + b"a" * 7000 + b"\r\n"] * 2000], 431),
        ([b"GET / HTTP/1.1\r\n", *[b"X: a\r\n"] * 102], 431),
        ([b"GET / HTTP/1.1\r\n", *[b"a" * 8000] * 2000], 431),
        ([b"GET /", *[b"a" * 1000] * 9], 414),
        ([CHUNKED + b"1\r\na\r\n0\r\n", *[b"X: " + b"a" * 7000 + b"\r\n"] * 2000], 431),
    ],
    ids=["endless value", "many bytes", "many headers", "endless name", "target", "trailers"],
)
async def test_head_over_the_limit_is_refused_before_it_ends_n13(
    pieces: Sequence[bytes], status: int
) -> None:
    app = App()
    async with serving(app) as port, connection(port) as (reader, writer):
        reading = asyncio.ensure_future(to_end(reader))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        assert_refusal(await reading, status)
    assert app.bodies == []


async def test_largest_allowed_head_is_served_also_in_pieces() -> None:
    app = App()
    lines = [b"X-%02d: " % index + b"a" * 600 + b"\r\n" for index in range(99)]
    pieces = [b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\n" + HOST, *lines, b"\r\n"]
    async with serving(app) as port, connection(port) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        assert (await until(reader, b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    assert len(app.scopes[0]["headers"]) == 100


async def test_trailers_do_not_become_headers_n16() -> None:
    app = App()
    async with serving(app) as port, connection(port) as (reader, writer):
        writer.write(CHUNKED + b"1\r\na\r\n0\r\nHost: evil\r\nAuthorization: x\r\n\r\n")
        await until(reader, b"<1>")
    assert [name for name, _ in app.scopes[0]["headers"]] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize("sent", [b"G", GET[:-2], GET[:-2] + b"X: a"])
async def test_head_that_never_ends_is_refused_in_time_n14(sent: bytes) -> None:
    app = App()
    async with serving(app, protocol=Hurried) as port:
        _, answer = await exchange(port, sent)
    assert "0.2 s" in assert_refusal(answer, 408, "request_timeout")
    assert app.scopes == []


async def test_body_that_never_ends_is_refused_in_time_n14() -> None:
    app = App()
    async with serving(app, protocol=Hurried) as port:
        _, answer = await exchange(port, FIRST_HALF)
        await asyncio.wait_for(app.left.wait(), 30)
    assert_refusal(answer, 408, "request_timeout")


async def test_second_request_of_a_connection_has_a_limit_too_n14() -> None:
    async with serving(App(), protocol=Hurried) as port, connection(port) as (reader, writer):
        writer.write(GET)
        await until(reader, b"0\r\n\r\n")
        writer.write(GET[:-2])
        assert_refusal(await to_end(reader), 408, "request_timeout")


async def test_answer_that_began_is_cut_and_not_followed_by_a_refusal_n14() -> None:
    async def answer_early(scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"early", "more_body": True})
        message: Message = {"type": "http.request"}
        while message["type"] != "http.disconnect":
            message = await receive()

    async with serving(answer_early, protocol=Hurried) as port:
        _, answer = await exchange(port, FIRST_HALF)
    assert answer.endswith(b"5\r\nearly\r\n")


async def test_answer_may_take_longer_than_the_request_n14() -> None:
    app = App()
    app.gate.clear()
    async with serving(app, protocol=Hurried) as port, connection(port) as (reader, writer):
        async with expiry(port):
            writer.write(FIRST_HALF)
            await asyncio.wait_for(app.began.wait(), 30)
            writer.write(b"67890")
        app.gate.set()
        assert b"<10>" in await until(reader, b"0\r\n\r\n")
        writer.write(GET)
        assert (await until(reader, b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_answer_to_a_whole_request_is_written_without_a_detour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("router.http.protocol._LingeringTransport.write")
    app = App()
    async with serving(app) as port, connection(port) as (reader, writer):
        writer.write(FIRST_HALF)
        await asyncio.wait_for(app.began.wait(), 30)
        writer.write(b"67890")
        assert b"<10>" in await until(reader, b"0\r\n\r\n")


async def test_request_that_waits_for_its_turn_is_not_late_n14() -> None:
    app = App()
    app.gate.clear()
    body = b"a" * 3_000_000
    upload = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with serving(app, protocol=Hurried) as port, connection(port) as (reader, writer):
        async with expiry(port):
            writer.write(GET + upload)
            await asyncio.wait_for(app.began.wait(), 30)
        app.gate.set()
        await until(reader, b"<0>")
        await until(reader, b"<3000000>")


async def test_slow_upload_within_the_limit_hinders_nobody_n14() -> None:
    app = create_app(make_services())
    messages = [{"role": "user", "content": "hi"}]
    upload = post_bytes("/v1/chat/completions", {"model": CHAT_MODEL, "messages": messages})
    async with serving(app) as port, connection(port) as (reader, writer):
        for offset in range(0, len(upload), 40):
            writer.write(upload[offset : offset + 40])
            await writer.drain()
            status, _ = await exchange(
                port, b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
            )
            assert status == 200
        assert (await until(reader, b"\r\n")) == b"HTTP/1.1 200 OK\r\n"


async def test_many_idle_connections_do_not_hinder_a_request_n14() -> None:
    async with serving(App()) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
        for _, writer in idle[::2]:
            writer.write(b"GET / HT")
        status, _ = await exchange(port, GET[:-2] + b"Connection: close\r\n\r\n")
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
    assert status == 200


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", GET, GET + b"\r\n"])
async def test_connection_that_rests_too_long_is_closed_n14(sent: bytes) -> None:
    async with serving(App(), protocol=Unresting) as port, connection(port) as (reader, writer):
        writer.write(sent)
        assert b"HTTP/1.1 4" not in await to_end(reader)


async def test_refusal_waits_for_the_answers_before_it_n16() -> None:
    app = App()
    app.gate.clear()
    async with serving(app) as port, connection(port) as (reader, writer):
        writer.write(GET + FIRST_HALF + b"67890" + CHUNKED + b"zz\r\n" + GET)
        await asyncio.wait_for(app.began.wait(), 30)
        app.gate.set()
        assert b"<0>" in await until(reader, b"0\r\n\r\n")
        assert b"<10>" in await until(reader, b"0\r\n\r\n")
        assert_refusal(await to_end(reader), 400)
    assert len(app.scopes) == 2


async def test_requests_that_wait_on_one_connection_are_bounded_n16() -> None:
    app = App()
    async with serving(app) as port:
        _, answer = await exchange(port, GET * (MAX_PIPELINED + 50))
    assert answer.count(b"HTTP/1.1 200 ") == len(app.scopes) == MAX_PIPELINED + 1
    assert_refusal(answer[answer.index(b"HTTP/1.1 400 ") :], 400)


async def test_client_that_leaves_is_noticed_although_it_sent_another_request_n16() -> None:
    began, left = asyncio.Event(), asyncio.Event()

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        await receive()
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        began.set()
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"token", "more_body": True})
            await asyncio.sleep(0)
        left.set()

    async with serving(stream) as port:
        async with connection(port) as (_, writer):
            writer.write(GET + GET)
            await asyncio.wait_for(began.wait(), 30)
        await asyncio.wait_for(left.wait(), 30)


async def test_application_that_answers_after_the_refusal_is_not_heard(
    caplog: pytest.LogCaptureFixture,
) -> None:
    began, gate, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answer_late(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        began.set()
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})
        ended.set()

    async with serving(answer_late) as port, connection(port) as (reader, writer):
        writer.write(CHUNKED)
        await asyncio.wait_for(began.wait(), 30)
        writer.write(b"zz\r\n")
        assert_refusal(await to_end(reader), 400)
        gate.set()
        await asyncio.wait_for(ended.wait(), 30)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_early_refusal_reaches_a_client_that_sends_all_before_it_reads_i2() -> None:
    app = create_app(make_services(max_body=1000))
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
    request = head + b"Content-Length: 9000000\r\n\r\n" + b"a" * 9_000_000

    def send_all_then_read(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(request)
            return client.makefile("rb").read()

    async with serving(app) as port:
        answer = await asyncio.to_thread(send_all_then_read, port)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in answer


async def test_client_that_sends_on_after_the_refusal_is_cut() -> None:
    async with serving(App(), protocol=Abrupt) as port, connection(port) as (reader, writer):
        writer.write(b"nonsense\r\n")
        assert_refusal(await to_end(reader), 400)
        with pytest.raises(ConnectionError):
            await send_for_ever(writer)
