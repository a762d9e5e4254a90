"""Tests of the load generator against a small server on loopback."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from scripts.bench_lib.client import ChunkedBody, Job, run_job

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def piece(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


def usage(prompt: int, completion: int, cached: int) -> bytes:
    details = {"cached_tokens": cached}
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
    return event({"choices": [], "usage": {**tokens, "prompt_tokens_details": details}})


@asynccontextmanager
async def serving(answer: bytes) -> AsyncGenerator[Job, None]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        json.loads(await reader.readexactly(length))
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield Job("127.0.0.1", server.sockets[0].getsockname()[1], [{"n": 1}, {"n": 2}])
    finally:
        server.close()
        await server.wait_closed()


def test_chunked_body_takes_bytes_one_by_one() -> None:
    whole = piece("a") + b": keep-alive\n\n" + piece("b") + b"data: [DONE]\n\n"
    raw = chunk(whole[:7]) + chunk(whole[7:]) + b"0\r\n\r\n"
    body = ChunkedBody()
    lines = [line for byte in raw for line in body.feed(bytes([byte]))]
    assert body.is_complete
    assert [line for line in lines if line != b"[DONE]"] == [
        piece("a")[6:-2],
        piece("b")[6:-2],
    ]


async def test_client_counts_tokens_from_usage() -> None:
    body = piece("Hel") + piece("lo", "length") + usage(9, 5, 4) + b"data: [DONE]\n\n"
    async with serving(HEAD + chunk(b": wait\n\n") + chunk(body) + b"0\r\n\r\n") as job:
        records = await run_job(job)
    assert len(records) == 2
    for record in records:
        assert (record.text, record.finish_reason, record.error) == ("Hello", "length", "")
        assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (9, 5, 4)
        assert len(record.arrivals) == 2
        assert record.sent_at <= record.arrivals[0] <= record.ended_at


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "HTTP 503: busy"),
        (HEAD + chunk(piece("x")), "closed in the middle"),
        (b"", "IncompleteReadError"),
        (HEAD + chunk(event({"error": {"message": "died"}})) + b"0\r\n\r\n", "died"),
        (HEAD + chunk(piece("x")) + b"0\r\n\r\n", "without usage"),
    ],
)
async def test_client_reports_a_failed_stream(answer: bytes, problem: str) -> None:
    async with serving(answer) as job:
        records = await run_job(job)
    assert all(problem in record.error for record in records)


async def test_client_reads_an_answer_that_ends_with_the_connection() -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\n"
    body = b": keepalive 1/2\n\n" + piece("Hi", "stop") + usage(3, 1, 0) + b"data: [DONE]\n\n"
    async with serving(head + body) as job:
        records = await run_job(job)
    assert [(each.text, each.prompt_tokens, each.error) for each in records] == [("Hi", 3, "")] * 2


async def test_client_notices_that_such_an_answer_is_cut() -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\n"
    async with serving(head + piece("Hi")) as job:
        records = await run_job(job)
    assert [each.error for each in records] == ["the stream ended without usage"] * 2
