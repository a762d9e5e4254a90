"""Stopping: what runs may end, nothing new begins, and who stops the server sees how far it is."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx

from core.types import TextDelta
from router.app import create_app
from tests.fakes import CHAT_MODEL, MANAGING, FakeDispatcher, finished, make_services
from tests.live_server import client_of, error_of

CHAT = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}


def client(dispatcher: FakeDispatcher, **headers: str) -> httpx.AsyncClient:
    # Draining needs nothing of what is managed.
    management: Any = SimpleNamespace(load=None, unload=None)
    services = replace(make_services(dispatcher), management=management)
    return client_of(create_app(services), **MANAGING, **headers)


async def test_f10_running_requests_end_and_new_ones_are_told_that_the_server_is_stopping() -> None:
    gate = asyncio.Event()
    dispatcher = FakeDispatcher(gate, TextDelta("late"), finished())
    async with client(dispatcher) as http:
        running = asyncio.ensure_future(http.post("/v1/chat/completions", json=CHAT))
        await dispatcher.began.wait()
        drained = await http.post("/api/drain", json={})
        assert drained.json() == {"draining": True, "in_flight": 1}
        refused = await http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert error_of(refused)["code"] == "draining"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["connection"] == "close"
        gate.set()
        assert (await running).json()["choices"][0]["message"]["content"] == "late"
        again = await http.post("/api/drain", json={})
        assert again.json() == {"draining": True, "in_flight": 0}
    assert len(dispatcher.requests) == 1


async def test_f10_health_and_metrics_answer_while_the_server_is_stopping() -> None:
    async with client(FakeDispatcher()) as http:
        await http.post("/api/drain", json={})
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
        ready = await http.get("/readyz")
        assert (ready.status_code, error_of(ready)["code"]) == (503, "draining")


async def test_a_foreign_page_cannot_stop_the_server() -> None:
    async with client(FakeDispatcher(), origin="https://elsewhere.example") as http:
        assert (await http.post("/api/drain", json={})).status_code == 403
    async with client(FakeDispatcher()) as http:
        assert (await http.post("/api/drain", content=b"{}")).status_code == 415
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
