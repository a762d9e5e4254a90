"""Large bodies: read within a budget, parsed away from the event loop, released afterwards."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from router.app import create_app
from router.requests import body as body_module
from router.requests.body import buffered
from router.requests.json_pieces import parse_json
from tests.fakes import CHAT_MODEL, FakeDispatcher, make_services
from tests.live_server import client_of, connection, error_of, serving
from tests.waiting import wait_until

HEADERS = {"content-type": "application/json"}
SMALL = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}
LARGE = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "x" * 100_000}]}


async def test_the_event_loop_runs_while_a_large_body_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsing, go_on = threading.Event(), threading.Event()

    def waiting_parse(body: bytes) -> dict[str, Any]:
        if len(body) > 10_000:
            parsing.set()
            assert go_on.wait(30)
        return parse_json(body)

    monkeypatch.setattr(body_module, "parse_json", waiting_parse)
    async with client_of(create_app(make_services())) as http:
        large = asyncio.ensure_future(http.post("/v1/chat/completions", json=LARGE))
        await asyncio.to_thread(parsing.wait, 30)
        # Another request is answered meanwhile.
        assert (await http.post("/v1/chat/completions", json=SMALL)).status_code == 200
        assert not large.done()
        assert buffered.total > 100_000
        go_on.set()
        assert (await large).status_code == 200
    assert buffered.total == 0


async def test_errors_of_the_thread_reach_the_client() -> None:
    broken = json.dumps({**LARGE, "temperature": 9}).encode()
    async with client_of(create_app(make_services())) as http:
        wrong = await http.post("/v1/chat/completions", content=broken, headers=HEADERS)
        cut = await http.post("/v1/chat/completions", content=broken[:-1], headers=HEADERS)
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "temperature")
    assert cut.status_code == 400
    assert buffered.total == 0


async def test_bodies_of_other_requests_may_fill_the_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body_module, "_MAX_BUFFERED", 300_000)
    held = asyncio.Event()
    first_part = asyncio.Event()

    async def slow() -> AsyncGenerator[bytes, None]:
        content = json.dumps({**LARGE, "user": "y" * 250_000}).encode()
        yield content[:320_000]
        first_part.set()
        await held.wait()
        yield content[320_000:]

    async with client_of(create_app(make_services())) as http:
        # Alone, a body may be larger than the budget.
        holder = asyncio.ensure_future(
            http.post("/v1/chat/completions", content=slow(), headers=HEADERS)
        )
        await first_part.wait()
        refused = await http.post("/v1/chat/completions", json=LARGE)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["code"] == "unavailable"
        assert (await http.post("/v1/chat/completions", json=SMALL)).status_code == 200
        held.set()
        assert (await holder).status_code == 200
        assert (await http.post("/v1/chat/completions", json=LARGE)).status_code == 200
    assert buffered.total == 0


@pytest.mark.parametrize("is_half_close", [False, True])
async def test_an_upload_that_breaks_off_leaves_nothing(is_half_close: bool) -> None:
    dispatcher = FakeDispatcher()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    )
    async with serving(create_app(make_services(dispatcher))) as port:
        before = len(asyncio.all_tasks())
        for _ in range(20):
            async with connection(port) as (reader, writer):
                writer.write(head + b"{" + b" " * 200_000)
                await writer.drain()
                if is_half_close:
                    writer.write_eof()
                    await asyncio.wait_for(reader.read(), 10)
        await wait_until(
            lambda: buffered.total == 0 and len(asyncio.all_tasks()) <= before,
            "bytes or tasks are left",
        )
    assert dispatcher.requests == []
