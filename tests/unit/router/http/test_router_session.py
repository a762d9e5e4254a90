"""Sessions of browsers: a link works once, and the cookie counts for own pages only."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from catalog.key_store import KeyStore
from core.settings import Settings
from deployments.router.credentials import StoredCredentials
from deployments.start.sign_in import sign_in_link
from router.app import create_app
from tests.clock import Clock
from tests.fakes import CHAT_MODEL, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement

COOKIE = "impetus_session_8000"
LOAD = f"/api/models/{CHAT_MODEL}/load"
DAY_S = 24 * 3600


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    """The database as another process sees it."""
    return KeyStore(tmp_path / "api_keys.sqlite")


@pytest.fixture
async def credentials(store: KeyStore, clock: Clock) -> AsyncIterator[StoredCredentials]:
    stored = StoredCredentials(store._path, clock=clock, now=clock)
    yield stored
    stored.close()
    store.close()


@pytest.fixture
def make_app(credentials: StoredCredentials) -> Callable[..., FastAPI]:
    def make(**settings: Any) -> FastAPI:
        services = make_services(**settings)
        management = FakeManagement()
        return create_app(replace(services, management=management, credentials=credentials))

    return make


@pytest.fixture
async def signed_in(store: KeyStore, make_app: Callable[..., FastAPI]) -> str:
    """The Cookie header of a browser that has followed a link."""
    code = store.create_link_code(now=1000.0)
    async with client_of(make_app()) as http:
        answer = await follow(http, code)
    return f"{COOKIE}={answer.cookies[COOKIE]}"


async def follow(http: httpx.AsyncClient, code: str) -> httpx.Response:
    """Open a link as an address typed into a browser."""
    headers = {"sec-fetch-site": "none", "sec-fetch-dest": "document"}
    return await http.get("/session", params={"code": code}, headers=headers)


async def test_a_link_sets_a_strict_cookie_and_works_once(
    store: KeyStore, make_app: Callable[..., FastAPI]
) -> None:
    code = store.create_link_code(now=1000.0)
    async with client_of(make_app()) as http:
        assert (await http.head("/session", params={"code": code})).status_code == 405
        answer = await follow(http, code)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        parts = {part.strip().lower() for part in answer.headers["set-cookie"].split(";")[1:]}
        assert {"httponly", "samesite=strict", "path=/", f"max-age={7 * DAY_S}"} <= parts
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        # The browser that has the cookie may reload the link; another gets nothing.
        assert (await follow(http, code)).status_code == 303
        http.cookies.clear()
        for used in (code, "", "x", "x" * 10_000):
            refused = await follow(http, used)
            assert refused.status_code == 403
            assert "scripts/keys link" in error_of(refused)["message"]
            assert "set-cookie" not in refused.headers


async def test_a_link_from_another_page_is_not_followed_n5(
    store: KeyStore, make_app: Callable[..., FastAPI]
) -> None:
    code = store.create_link_code(now=1000.0)
    async with client_of(make_app(), **{"sec-fetch-site": "cross-site"}) as http:
        assert (await http.get("/session", params={"code": code})).status_code == 403
    async with client_of(make_app()) as http:
        assert (await follow(http, code)).status_code == 303


@pytest.mark.parametrize(
    "page",
    [
        {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"},
        {"origin": "http://localhost:8000"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [{}, {"api_key": "canary-key-1234"}], ids=str)
async def test_own_pages_manage_and_chat_with_the_cookie(
    make_app: Callable[..., FastAPI],
    signed_in: str,
    page: dict[str, str],
    settings: dict[str, str],
) -> None:
    async with client_of(make_app(**settings), cookie=f"a=b; {signed_in}", **page) as http:
        assert (await http.post(LOAD, json={})).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/api/keys")).status_code == 200
        shown = await http.get("/api/session")
        assert shown.json() == {"scopes": ["inference", "manage", "read"]}


@pytest.mark.parametrize(
    "page",
    [
        {"origin": "http://localhost:5173", "sec-fetch-site": "same-site"},
        {"origin": "http://localhost:5173"},
        {"origin": "vscode-webview://1a2b3c"},
        {"origin": "file://"},
        {"sec-fetch-site": "same-site"},
        # What a browser without Sec-Fetch-Site could send for another page: no Origin.
        {"referer": "http://localhost:5173/"},
    ],
    ids=str,
)
async def test_pages_of_other_ports_cannot_use_the_cookie_n5(
    make_app: Callable[..., FastAPI], signed_in: str, page: dict[str, str]
) -> None:
    for settings, status in (({}, 403), ({"api_key": "canary-key-1234"}, 401)):
        async with client_of(make_app(**settings), cookie=signed_in, **page) as http:
            assert (await http.post(LOAD, json={})).status_code == status
            made = await http.post("/api/keys", json={"name": "a", "scopes": ["manage"]})
            assert made.status_code == status


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        COOKIE,
        f"{COOKIE}=",
        f"{COOKIE}=wrong",
        f"{COOKIE}={'x' * 5000}",
        f"{COOKIE}=é",
        "impetus_session_8001={token}",
    ],
)
async def test_another_cookie_opens_nothing(
    make_app: Callable[..., FastAPI], signed_in: str, cookie: str
) -> None:
    text = cookie.format(token=signed_in.partition("=")[2]).encode("latin-1")
    headers = [(b"cookie", text), (b"sec-fetch-site", b"same-origin")]
    async with client_of(make_app()) as http:
        assert (await http.post(LOAD, json={}, headers=headers)).status_code == 403


async def test_a_session_opened_by_the_api_ends_by_it_and_by_time(
    store: KeyStore, make_app: Callable[..., FastAPI], clock: Clock
) -> None:
    page = {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
    async with client_of(make_app(), **page) as http:
        for _ in range(2):
            code = store.create_link_code(now=clock.now)
            assert (await http.post(LOAD, json={})).status_code == 403
            opened = await http.post("/api/session", json={"code": code})
            assert opened.status_code == 204
            assert (await http.post(LOAD, json={})).status_code == 200
            ended = await http.delete("/api/session")
            assert ended.status_code == 204
            again = {"cookie": f"{COOKIE}={opened.cookies[COOKIE]}"}
            assert (await http.post(LOAD, json={}, headers=again)).status_code == 403
        code = store.create_link_code(now=clock.now)
        await http.post("/api/session", json={"code": code})
        clock.now += 7 * DAY_S - 1
        assert (await http.post(LOAD, json={})).status_code == 200
        clock.now += 1
        assert (await http.post(LOAD, json={})).status_code == 403
        assert (await http.delete("/api/session")).status_code == 204


async def test_the_scopes_of_a_key_are_told(
    credentials: StoredCredentials, make_app: Callable[..., FastAPI]
) -> None:
    _, text = await credentials.create_key("a", ["read"], None)
    async with client_of(make_app()) as http:
        assert (await http.get("/api/session")).status_code == 401
        own = {"authorization": f"Bearer {text}"}
        assert (await http.get("/api/session", headers=own)).json() == {"scopes": ["read"]}


async def test_the_printed_link_is_followed(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, host="0.0.0.0", port=8123, api_key="canary-key-1234")
    link = httpx.URL(sign_in_link(settings))
    assert (link.host, link.port, link.path) == ("127.0.0.1", 8123, "/session")
    stored = StoredCredentials(settings.key_database)
    app = create_app(replace(make_services(**settings.model_dump()), credentials=stored))
    async with client_of(app) as http:
        answer = await follow(http, link.params["code"])
        assert answer.cookies["impetus_session_8123"]
    stored.close()
