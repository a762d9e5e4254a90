"""Clients that leave at any moment leave no task, descriptor or request behind."""

import asyncio
import json
import logging
import os
import socket
import struct
from typing import Any

import pytest

from core.types import TextDelta
from router.app import create_app
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import connection, serving, until
from tests.waiting import wait_until

CHAT: dict[str, Any] = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}
TIMES = 25


def post(stream: bool) -> bytes:
    body = json.dumps({**CHAT, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def open_descriptors() -> int:
    # /dev/fd exists on Linux and on macOS.
    return len(os.listdir("/dev/fd"))


def reset(writer: asyncio.StreamWriter) -> None:
    """Make closing send RST, as a killed client or a vanished network does."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["close", "reset", "half-close"])
async def test_a_client_that_leaves_while_it_waits_leaves_nothing(stream: bool, way: str) -> None:
    dispatcher = FakeDispatcher(asyncio.Event())
    async with serving(create_app(make_services(dispatcher))) as port:
        tasks, descriptors = len(asyncio.all_tasks()), open_descriptors()
        for number in range(TIMES):
            dispatcher.began.clear()
            async with connection(port) as (_, writer):
                writer.write(post(stream))
                await asyncio.wait_for(dispatcher.began.wait(), 10)
                if way == "reset":
                    reset(writer)
                elif way == "half-close":
                    # Some clients close their side after the request: indistinguishable from gone.
                    writer.write_eof()
                    await asyncio.wait_for(dispatcher.idle.wait(), 10)
            await asyncio.wait_for(dispatcher.idle.wait(), 10)
            assert len(dispatcher.requests) == number + 1
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "tasks are left")
        await wait_until(lambda: open_descriptors() <= descriptors, "descriptors are left")
    assert dispatcher.running == 0


@pytest.mark.parametrize("cut_at", [1, 40, 150])
async def test_a_request_that_breaks_off_leaves_nothing(cut_at: int) -> None:
    dispatcher = FakeDispatcher()
    async with serving(create_app(make_services(dispatcher))) as port:
        tasks, descriptors = len(asyncio.all_tasks()), open_descriptors()
        for number in range(TIMES):
            async with connection(port) as (_, writer):
                writer.write(post(stream=True)[:cut_at])
                await writer.drain()
                if number % 2:
                    reset(writer)
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "tasks are left")
        await wait_until(lambda: open_descriptors() <= descriptors, "descriptors are left")
    assert dispatcher.requests == []


async def test_a_client_that_leaves_in_the_stream_leaves_nothing() -> None:
    gate = asyncio.Event()
    dispatcher = FakeDispatcher(TextDelta("first"), gate, finished())
    async with serving(create_app(make_services(dispatcher))) as port:
        tasks, descriptors = len(asyncio.all_tasks()), open_descriptors()
        for _ in range(TIMES):
            async with connection(port) as (reader, writer):
                writer.write(post(stream=True))
                await until(reader, b"first")
            await asyncio.wait_for(dispatcher.idle.wait(), 10)
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "tasks are left")
        await wait_until(lambda: open_descriptors() <= descriptors, "descriptors are left")


async def test_names_in_log_lines_stay_on_one_line_n17(caplog: pytest.LogCaptureFixture) -> None:
    from ray._common.formatters import JSONFormatter

    caplog.set_level(logging.DEBUG)
    evil = 'a\r\n{"levelname": "ERROR"}\x1b[31m\u202e' + "x" * 100_000
    body = json.dumps({**CHAT, "model": evil, evil: 1}).encode()
    async with serving(create_app(make_services())) as port, connection(port) as (reader, writer):
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\x0b\r\n"
            b"Content-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        await asyncio.wait_for(reader.read(), 10)
    for record in caplog.records:
        line = JSONFormatter().format(record)
        assert line.isascii()
        assert "\n" not in line
        assert len(line) < 4096
