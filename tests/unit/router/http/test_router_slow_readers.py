"""Clients that do not take their answer."""

import asyncio
from typing import ClassVar

import pytest
from starlette.types import Receive, Scope, Send

from router.http.protocol import HttpProtocol
from tests.live_server import connection, count_to_end_or_reset, serving, until


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
