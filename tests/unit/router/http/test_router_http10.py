"""HTTP/1.0 clients: streams without chunks that the end of the connection ends."""

import asyncio
import json

import pytest

from core.types import TextDelta
from router.app import create_app
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import connection, exchange, serving, until

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"]


def request_of(path: str, *, stream: bool, version: str = "1.0", headers: str = "") -> bytes:
    name = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    value = [{"role": "user", "content": "hi"}] if name == "messages" else "hi"
    fields = {"model": CHAT_MODEL, "stream": stream, "max_tokens": 5, name: value}
    body = json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/{version}\r\nHost: localhost\r\n{headers}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", ["", "Connection: keep-alive\r\n", "Expect: 100-continue\r\n"])
async def test_streams_end_with_the_connection(path: str, headers: str) -> None:
    dispatcher = FakeDispatcher(TextDelta("Hello"), TextDelta(" world"), finished())
    app = create_app(make_services(dispatcher))
    async with serving(app) as port:
        status, plain = await exchange(port, request_of(path, stream=True, headers=headers))
        _, chunked = await exchange(
            port, request_of(path, stream=True, version="1.1", headers="Connection: close\r\n")
        )
    head, _, body = plain.partition(b"\r\n\r\n")
    assert status == 200
    assert b"transfer-encoding" not in head.lower()
    assert b"content-length" not in head.lower()
    assert b"connection: close" in head.lower()
    assert b"100 Continue" not in plain
    assert b"transfer-encoding: chunked" in chunked
    # The same events, without the lines that give the sizes of chunks.
    lines = [line for line in body.split(b"\n") if line]
    assert all(line.startswith((b"data:", b"event:", b":")) for line in lines)
    assert b"Hello" in body
    assert b" world" in body


async def test_tokens_arrive_while_the_stream_goes_on() -> None:
    gate = asyncio.Event()
    app = create_app(make_services(FakeDispatcher(TextDelta("early"), gate, finished())))
    async with serving(app) as port, connection(port) as (reader, writer):
        writer.write(request_of("/v1/chat/completions", stream=True))
        await until(reader, b"early")
        gate.set()
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", PATHS)
async def test_whole_answers_and_errors_have_their_length(path: str) -> None:
    async with serving(create_app(make_services())) as port:
        for request in (
            request_of(path, stream=False),
            request_of(path, stream=False).replace(b'"hi"', b"[7 ]"),
            b"GET /v1/models HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n",
        ):
            _, answer = await exchange(port, request)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert f"content-length: {len(body)}".encode() in head
            assert b"connection: close" in head
            assert json.loads(body)


async def test_head_of_http10_has_no_body() -> None:
    async with serving(create_app(make_services())) as port:
        request = b"HEAD /v1/models HTTP/1.0\r\nHost: localhost\r\n\r\n"
        status, answer = await exchange(port, request)
    assert status == 200
    assert answer.endswith(b"\r\n\r\n")


async def test_a_failure_during_the_stream_is_said_before_the_connection_ends() -> None:
    app = create_app(make_services(FakeDispatcher(TextDelta("x"), RuntimeError("bug"))))
    async with serving(app) as port:
        _, answer = await exchange(port, request_of("/v1/chat/completions", stream=True))
    assert b"internal_error" in answer
    assert answer.endswith(b"data: [DONE]\n\n")
