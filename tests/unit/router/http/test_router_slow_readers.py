"""Clients that do not take their answer."""

import asyncio
import socket
from typing import ClassVar

import pytest
from starlette.types import Receive, Scope, Send

from router.app import create_app
from router.http.protocol import HttpProtocol
from tests.fakes import make_services
from tests.live_server import connection, count_to_end_or_reset, post_bytes, serving, until
from tests.unit.router.answers.test_router_streams import CHAT, EndlessDispatcher
from tests.waiting import wait_until


class Remembered(HttpProtocol):
    made: ClassVar[list[HttpProtocol]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.made.append(self)


async def answer_much(scope: Scope, receive: Receive, send: Send) -> None:
    del scope, receive
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a" * 12_000_000})


@pytest.mark.parametrize("takes_some", [True, False])
async def test_client_that_stops_taking_its_answer_is_cut(takes_some: bool) -> None:
    Remembered.made.clear()
    async with (
        serving(answer_much, protocol=Remembered) as port,
        connection(port) as (reader, writer),
    ):
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await until(reader, b"\r\n\r\n")
        taken = 0
        for _ in range(2):
            # As the timer does when the time for idle connections is over.
            Remembered.made[0]._unset_keepalive_if_required()
            Remembered.made[0].timeout_keep_alive_handler()
            if takes_some:
                taken += len(await reader.readexactly(1_000_000))
        taken += await count_to_end_or_reset(reader)
    assert (taken >= 12_000_000) is takes_some


class Hasty(HttpProtocol):
    write_limit_s = 0.2


class Endless:
    """Streams for ever, and says when it was ended."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        watcher = asyncio.ensure_future(self._watch(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not watcher.done():
            await send({"type": "http.response.body", "body": b"a" * 100_000, "more_body": True})
            self.began.set()
        self.ended.set()

    @staticmethod
    async def _watch(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_client_that_reads_nothing_of_a_stream_is_cut_n15(version: bytes) -> None:
    app = Endless()
    async with serving(app, protocol=Hasty) as port:
        tasks = len(asyncio.all_tasks())
        async with connection(port) as (_, writer):
            writer.write(b"GET / HTTP/" + version + b"\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(app.began.wait(), 10)
            await asyncio.wait_for(app.ended.wait(), 30)
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "tasks are left")


class Timed(HttpProtocol):
    """Keeps most of an answer in its own buffer; its limit is over when the test says so."""

    made: ClassVar[list["Timed"]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)
        self.made.append(self)


async def test_client_that_reads_slowly_is_not_cut_n15() -> None:
    app, limits = Endless(), 0
    async with serving(app, protocol=Timed) as port, connection(port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while limits < 5:
            await wait_until(
                lambda: Timed.made and Timed.made[-1]._write_timer, "the answer is not held back"
            )
            transport, timer = Timed.made[-1].transport, Timed.made[-1]._write_timer
            assert timer is not None
            (unsent,) = timer._arguments
            while Timed.made[-1]._write_timer is timer:
                await reader.readexactly(1000)
                if transport.get_write_buffer_size() < unsent:
                    timer.cancel()
                    timer._callback(unsent)
                    limits += 1
                    break
            assert not transport.is_closing()
        assert not app.ended.is_set()


async def test_a_stream_that_is_not_read_leaves_no_task_n15() -> None:
    dispatcher = EndlessDispatcher()
    async with serving(create_app(make_services(dispatcher)), protocol=Hasty) as port:
        tasks = len(asyncio.all_tasks())
        async with connection(port) as (_, writer):
            writer.write(post_bytes("/v1/chat/completions", {**CHAT, "stream": True}))
            await asyncio.wait_for(dispatcher.began.wait(), 10)
            await asyncio.wait_for(dispatcher.idle.wait(), 30)
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "tasks are left")
