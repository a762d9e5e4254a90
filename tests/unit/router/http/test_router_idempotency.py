"""`Idempotency-Key`: what is made once, what is refused, and how much is kept."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from core.errors import HubUnavailable
from deployments.router.credentials import StoredCredentials
from router.app import create_app
from router.http import idempotency
from router.http.access import Access
from router.http.idempotency import KeptAnswers
from router.route import Route, add_routes
from tests.clock import Clock
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement
from tests.unit.router.api.test_router_jobs import FakeJobs

Ask = Callable[..., Awaitable[httpx.Response]]
BODY = {"model": "org/tiny"}


@pytest.fixture
def jobs() -> FakeJobs:
    return FakeJobs()


@pytest.fixture
def app(jobs: FakeJobs) -> FastAPI:
    return create_app(replace(make_services(), management=FakeManagement(), jobs=jobs))


@pytest.fixture
def ask(app: FastAPI) -> Ask:
    async def send(body: Any = BODY, key: str = "k1", **headers: str) -> httpx.Response:
        sent = {**MANAGING, "idempotency-key": key, **headers}
        async with client_of(app) as client:
            return await client.post("/api/downloads", json=body, headers=sent)

    return send


class Maker:
    """An endpoint that counts its runs; `gate` holds it, `answers` are sent in turn."""

    def __init__(self, *sizes: int) -> None:
        self.runs = 0
        self.sizes = sizes
        self.gate: asyncio.Event | None = None

    async def make_it(self, request: Request) -> Response:
        body = await request.body()
        self.runs += 1
        if self.gate is not None:
            await self.gate.wait()
        size = self.sizes[self.runs - 1] if self.runs <= len(self.sizes) else 0
        return Response(body + b"." * size, 201, {"x-run": str(self.runs)})


def asked(kept: KeptAnswers, maker: Maker) -> Callable[..., Awaitable[Response]]:
    endpoint = kept.once(maker.make_it)

    async def send(key: str, body: bytes = b"{}") -> Response:
        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/api/things",
            "query_string": b"",
            "headers": [(b"idempotency-key", key.encode()), (b"host", b"localhost")],
        }
        return await endpoint(Request(scope, receive))

    return send


async def test_the_same_key_begins_one_download(ask: Ask, jobs: FakeJobs) -> None:
    first, again = await ask(), await ask()
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["content-type"] == "application/json"
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    assert len(jobs.calls) == 1
    await ask(key="k2")
    assert len(jobs.calls) == 2


async def test_another_body_with_the_same_key_is_refused(ask: Ask, jobs: FakeJobs) -> None:
    await ask()
    refused = await ask({"model": "org/other"})
    error = error_of(refused)
    assert (refused.status_code, error["code"]) == (422, "idempotency_key_reused")
    assert error["param"] == "idempotency-key"
    assert len(jobs.calls) == 1


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\xe9"])
async def test_malformed_keys_are_refused(app: FastAPI, jobs: FakeJobs, key: str) -> None:
    headers = [(b"idempotency-key", key.encode("latin-1"))]
    async with client_of(app, **MANAGING) as client:
        refused = await client.post("/api/downloads", json=BODY, headers=headers)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "idempotency-key")
    assert jobs.calls == []


async def test_what_failed_is_tried_again(ask: Ask, jobs: FakeJobs) -> None:
    jobs.problem = HubUnavailable("The hub is down.")
    assert (await ask()).status_code == 503
    jobs.problem = None
    assert (await ask()).status_code == 202
    assert len(jobs.calls) == 2


async def test_without_the_header_each_request_counts(app: FastAPI, jobs: FakeJobs) -> None:
    async with client_of(app, **MANAGING) as client:
        for _ in range(2):
            assert (await client.post("/api/downloads", json=BODY)).status_code == 202
    assert len(jobs.calls) == 2


async def test_keys_of_different_callers_are_apart(tmp_path: Path, jobs: FakeJobs) -> None:
    credentials = StoredCredentials(tmp_path / "keys.sqlite")
    services = replace(make_services(), management=FakeManagement(), jobs=jobs)
    app = create_app(replace(services, credentials=credentials))
    async with client_of(app) as client:
        for name in ("a", "b"):
            body = {"name": name, "scopes": ["manage"]}
            created = await client.post("/api/keys", json=body, headers=MANAGING)
            headers = {"authorization": f"Bearer {created.json()['key']}", "idempotency-key": "k"}
            for _ in range(2):
                await client.post("/api/downloads", json=BODY, headers=headers)
    credentials.close()
    assert len(jobs.calls) == 2


async def test_a_created_key_is_shown_again_and_not_made_twice(tmp_path: Path) -> None:
    credentials = StoredCredentials(tmp_path / "keys.sqlite")
    app = create_app(replace(make_services(), management=FakeManagement(), credentials=credentials))
    headers = {**MANAGING, "idempotency-key": "k"}
    async with client_of(app) as client:
        body = {"name": "a", "scopes": ["read"]}
        first = await client.post("/api/keys", json=body, headers=headers)
        again = await client.post("/api/keys", json=body, headers=headers)
        listed = (await client.get("/api/keys", headers=MANAGING)).json()["keys"]
    credentials.close()
    assert (first.json(), again.status_code) == (again.json(), 201)
    assert again.headers["cache-control"] == "no-store"
    assert len(listed) == 1


async def test_requests_at_the_same_time_run_once() -> None:
    maker = Maker()
    maker.gate = asyncio.Event()
    send = asked(KeptAnswers(), maker)
    running = [asyncio.ensure_future(send("k")) for _ in range(3)]
    while not maker.runs:
        await asyncio.sleep(0)
    maker.gate.set()
    answers = await asyncio.gather(*running)
    assert maker.runs == 1
    assert {answer.headers["x-run"] for answer in answers} == {"1"}


async def test_when_the_first_is_cancelled_the_next_runs() -> None:
    maker = Maker()
    maker.gate = asyncio.Event()
    send = asked(KeptAnswers(), maker)
    first, second = (asyncio.ensure_future(send("k")) for _ in range(2))
    while not maker.runs:
        await asyncio.sleep(0)
    first.cancel()
    maker.gate.set()
    assert (await second).headers["x-run"] == "2"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_answers_are_kept_for_a_day() -> None:
    clock, maker = Clock(0.0), Maker()
    kept = KeptAnswers(clock)
    send = asked(kept, maker)
    await send("k")
    clock.now = 24 * 3600 - 1
    await send("k")
    assert maker.runs == 1
    clock.now += 1
    await send("k", b"other")
    assert (maker.runs, len(kept)) == (2, 1)


async def test_number_and_memory_of_kept_answers_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(idempotency, "_MOST_ANSWERS", 3)
    maker = Maker()
    kept = KeptAnswers()
    send = asked(kept, maker)
    for number in range(5):
        await send(f"k{number}")
    assert len(kept) == 3
    await send("k4")
    assert maker.runs == 5
    await send("k0")
    assert maker.runs == 6


async def test_large_answers_make_room_by_forgetting_the_oldest() -> None:
    maker = Maker(*[3 << 20] * 5)
    kept = KeptAnswers()
    send = asked(kept, maker)
    for number in range(5):
        await send(f"k{number}")
        assert kept.used_bytes <= 8 << 20
    assert len(kept) == 2
    await send("k4")
    assert maker.runs == 5


def test_only_routes_that_say_so_honour_the_header() -> None:
    async def make_it(request: Request) -> Response:
        del request
        return Response()

    app = FastAPI()
    routes = [
        Route(Access.MANAGE, "POST", f"/api/{name}", make_it, is_idempotent=name == "a")
        for name in "ab"
    ]
    add_routes(app, routes)
    once, plain = app.routes[-2:]
    assert getattr(plain, "endpoint") is make_it  # noqa: B009
    assert getattr(once, "endpoint") is not make_it  # noqa: B009
    assert getattr(once, "endpoint").__name__ == "make_it"  # noqa: B009
