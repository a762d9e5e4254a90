"""`GET /api/events` and `GET /api/state` over HTTP, with readers that come, go and do not read."""

import asyncio
import json
import re
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from core.types import TextDelta
from router.api.events import events_endpoint
from router.app import create_app
from router.events.hub import EventHub
from router.http.drain import Drain
from router.http.protocol import HttpProtocol
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import client_of, connection, error_of, serving, until
from tests.unit.router.events.sources import FakeSources, decision, model_event, parsed
from tests.waiting import wait_until

CHAT = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "a secret prompt"}]}


@pytest.fixture
async def hub() -> EventHub:
    return EventHub(FakeSources())


def app_of(hub: EventHub, drain: Drain | None = None, **settings: Any) -> FastAPI:
    dispatcher = FakeDispatcher(TextDelta("a secret answer"), finished(completion=2))
    services = replace(make_services(dispatcher, **settings), events=hub)
    return create_app(services, drain=drain)


def get(path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@asynccontextmanager
async def reading(
    port: int, path: str = "/api/events", *headers: str
) -> AsyncIterator[asyncio.StreamReader]:
    async with connection(port) as (reader, writer):
        writer.write(get(path, *headers))
        head = await until(reader, b"\r\n\r\n")
        assert b"200 OK" in head, head
        assert b"text/event-stream" in head
        yield reader


async def next_event(reader: asyncio.StreamReader) -> tuple[str, str, Any]:
    """Return the next event; the framing of HTTP chunks is left out."""
    text = (await until(reader, b"data: ")) + await until(reader, b"\n\n")
    lines = [line for line in text.decode().replace("\r", "").splitlines() if ": " in line]
    (event,) = parsed("\n".join(line for line in lines if not line.startswith("retry")))
    return event


async def test_stream_begins_with_a_reset_and_goes_on_after_the_last_id(hub: EventHub) -> None:
    async with serving(app_of(hub)) as port:
        async with reading(port) as reader:
            _, kind, _ = await next_event(reader)
            assert kind == "reset"
            hub.publish(model_event("a"))
            last_id, kind, data = await next_event(reader)
            assert (kind, data["model"]["id"]) == ("model.state", "a")
        hub.publish(decision("missed"))
        async with reading(port, "/api/events", f"Last-Event-ID: {last_id}") as reader:
            assert (await next_event(reader))[2]["reason"] == "missed"
        async with reading(port, f"/api/events?last_event_id={last_id}") as reader:
            assert (await next_event(reader))[2]["reason"] == "missed"
        # The header is newer than the address that a browser repeats.
        newest = re.sub("-[0-9]+$", "-2", last_id)
        path = f"/api/events?last_event_id={last_id}"
        async with reading(port, path, f"Last-Event-ID: {newest}") as reader:
            hub.publish(decision("new"))
            assert (await next_event(reader))[2]["reason"] == "new"


async def test_ids_that_mean_nothing_reset_and_unknown_parameters_are_refused(
    hub: EventHub,
) -> None:
    app = app_of(hub)
    async with serving(app) as port:
        for wrong in ("x", "%0A", "a" * 64, "-".join("11")):
            async with reading(port, f"/api/events?last_event_id={wrong}") as reader:
                assert (await next_event(reader))[2]["reason"] == "unknown_id"
        async with reading(port, "/api/events", "Last-Event-ID: " + "b" * 5000) as reader:
            assert (await next_event(reader))[2]["reason"] == "unknown_id"
    async with client_of(app) as http:
        refused = await http.get("/api/events?since=1")
        assert error_of(refused)["param"] == "since"
        refused = await http.get(f"/api/events?last_event_id={'a' * 65}")
        assert (refused.status_code, error_of(refused)["param"]) == (400, "last_event_id")


async def test_pages_need_a_session_and_a_head_request_ends(hub: EventHub) -> None:
    app = app_of(hub)
    async with client_of(app, origin="http://localhost:8000") as http:
        for path in ("/api/events", "/api/state"):
            assert (await http.get(path)).status_code == 403
    async with client_of(app) as http:
        head = await http.head("/api/events")
        assert (head.status_code, head.content) == (200, b"")
    with_key = app_of(hub, api_key="canary-key-1234")
    async with client_of(with_key) as http:
        assert (await http.get("/api/events")).status_code == 401
        key = {"authorization": "Bearer canary-key-1234"}
        assert (await http.get("/api/state", headers=key)).status_code == 200


async def test_requests_are_told_without_their_content(hub: EventHub) -> None:
    async with client_of(app_of(hub)) as http:
        state = (await http.get("/api/state")).json()
        for stream in (True, False):
            answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            assert answer.status_code == 200
        assert (await http.post("/v1/chat/completions", json={})).status_code == 400
        with hub.reader(state["event_id"]) as reader:
            text = reader.take()
    assert "secret" not in text
    events = [data for _, _, data in parsed(text)]
    assert [event["type"] for event in events] == ["request.started", "request.finished"] * 2
    for started, ended in (events[:2], events[2:]):
        assert ended["request"] == started["request"]
        assert ended["request"]["model"] == CHAT_MODEL
        assert ended["request"]["endpoint"] == "/v1/chat/completions"
        assert ended["status"] == 200
        assert (ended["prompt_tokens"], ended["completion_tokens"]) == (7, 2)
        assert ended["cached_tokens"] == 3
        assert 0 <= ended["first_token_ms"] <= ended["duration_ms"]
    assert (await hub.state()).requests == ()


async def test_a_reader_does_not_hold_up_the_end_of_the_server(hub: EventHub) -> None:
    drain = Drain()
    app = app_of(hub, drain)
    async with serving(app) as port, reading(port) as reader:
        await next_event(reader)
        assert drain.in_flight == 0
        drain.is_on = True
        async with client_of(app) as http:
            assert (await http.get("/api/events")).status_code == 503
        hub.close()
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"0\r\n\r\n")


async def test_silence_is_filled_and_the_lifetime_ends_the_stream(hub: EventHub) -> None:
    app = FastAPI()
    app.add_api_route(
        "/events", events_endpoint(hub, keep_alive_s=0.05, lifetime_s=0.5), response_model=None
    )
    async with serving(app) as port, reading(port, "/events") as reader:
        text = await asyncio.wait_for(reader.read(), 10)
    assert 5 <= text.count(b": keep-alive\n\n") <= 12
    assert text.endswith(b"0\r\n\r\n")


class Hasty(HttpProtocol):
    write_limit_s = 1.0


async def test_reader_that_never_reads_costs_no_memory_and_is_cut_n15(hub: EventHub) -> None:
    big = decision("x" * 20_000)
    async with serving(app_of(hub), protocol=Hasty) as port, connection(port) as (_, writer):
        writer.write(get("/api/events"))
        await wait_until(lambda: bool(hub._readers), "the reader is there")
        (stream,) = hub._readers
        tracemalloc.start()
        # 20 MB, of which the socket takes a few and the log keeps 8.
        for _ in range(100):
            for _ in range(10):
                hub.publish(big)
            await asyncio.sleep(0)
        assert hub._log is not None
        assert hub._log.after(stream._at, 1) is None
        held_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 7_000_000 < held_bytes < 10_000_000
        # Others read on meanwhile.
        async with reading(port) as reader:
            assert (await next_event(reader))[1] == "reset"
        await wait_until(lambda: stream not in hub._readers, "the connection is cut", 10)


async def test_state_and_events_are_described_by_type(hub: EventHub) -> None:
    async with client_of(app_of(hub)) as http:
        described = (await http.get("/openapi.json")).json()
    stream = described["paths"]["/api/events"]["get"]
    (schema, _) = stream["responses"]["200"]["content"]["text/event-stream"]["x-event-data"][
        "anyOf"
    ]
    event = described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert {"model.state", "job.progress", "memory", "thermal", "request.finished", "reset"} <= set(
        event["discriminator"]["mapping"]
    )
    assert [one["name"] for one in stream["parameters"]] == ["last_event_id"]
    state = described["paths"]["/api/state"]["get"]["responses"]["200"]["content"]
    assert "ServerState" in json.dumps(state["application/json"])
