"""Access classes: every route has one, and no web page manages anything without the token."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from core.keys import MANAGEMENT_TOKEN, read_key
from deployments.router.credentials import StoredCredentials
from router.app import create_app
from router.http.access import Access, access_of
from tests.fakes import CHAT_MODEL, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement

TOKEN = "canary-token-5678"
KEY = "canary-key-1234"
PAGES = [
    {"origin": "file://"},
    {"origin": "vscode-webview://1a2b3c"},
    {"origin": "app://obsidian.md"},
    {"origin": "tauri://localhost"},
    {"origin": "http://localhost:5173"},
    {"origin": "http://localhost:8000"},
    {"origin": "https://chat.example.org"},
    {"origin": "https://evil.com"},
    {"origin": "null"},
    {"sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
    {"sec-fetch-dest": "iframe"},
    {"referer": "http://localhost:8000/"},
]
CREDENTIALS = [{"authorization": f"Bearer {TOKEN}"}, {"x-impetus-token": TOKEN}]


def make_app(
    management: Any = None, credentials: StoredCredentials | None = None, **settings: Any
) -> FastAPI:
    services = make_services(allowed_origins=["https://chat.example.org"], **settings)
    return create_app(
        replace(
            services,
            management=management or FakeManagement(),
            management_token=TOKEN,
            credentials=credentials,
        )
    )


def unclassified(app: FastAPI) -> list[str]:
    """Return the paths of routes whose class is missing, or is not what the guard applies."""
    classes = {access.value for access in Access}
    wrong = []
    for route in app.routes:
        path = str(getattr(route, "path", route))
        tags = set(route.tags) if isinstance(route, APIRoute) else set()
        applied = {access_of(method, path).value for method in getattr(route, "methods", ())}
        if tags & classes != applied or len(applied) != 1:
            wrong.append(path)
    return wrong


def classified(app: FastAPI) -> list[str]:
    """Return a line for each route: its class, method and path."""
    return sorted(
        f"{access_of(method, route.path).value:9}  {method:6}  {route.path}"
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    )


def management_calls(app: FastAPI) -> list[tuple[str, str]]:
    return [
        (method, route.path.replace("{model_id:path}", CHAT_MODEL))
        for route in app.routes
        if isinstance(route, APIRoute)
        and route.path.startswith("/api/")
        and {Access.MANAGE.value, Access.READ.value} & set(route.tags)
        for method in sorted(route.methods or ())
    ]


def access_status(answer: httpx.Response) -> int:
    """Return 401 or 403 if access was denied; 200 if the handler ran, whatever it found."""
    assert answer.status_code in (200, 204, 400, 401, 403, 404)
    return answer.status_code if answer.status_code in (401, 403) else 200


def test_every_route_has_an_access_class_n7(tmp_path: Path) -> None:
    """With `pytest -s` it prints the list of routes with their classes."""
    credentials = StoredCredentials(tmp_path / "keys.sqlite")
    app = make_app(credentials=credentials)
    credentials.close()
    assert unclassified(app) == []
    assert ("POST", "/api/drain") in management_calls(app)
    lines = classified(app)
    sys.stdout.write("\n".join(lines) + "\n")
    assert {line.split()[0] for line in lines} == {access.value for access in Access}
    assert "read       GET     /metrics" in lines
    assert "manage     GET     /api/keys" in lines

    async def endpoint(request: Request) -> Response:
        del request
        return Response()

    app.add_api_route("/v1/new", endpoint, methods=["POST"])
    app.add_api_route("/manage", endpoint, methods=["POST"], tags=["manage"])
    app.add_route("/old", endpoint)
    assert unclassified(app) == ["/v1/new", "/manage", "/old"]


@pytest.mark.parametrize("page", PAGES, ids=str)
async def test_no_page_manages_without_the_token_n5(page: dict[str, str]) -> None:
    management = FakeManagement()
    app = make_app(management)
    async with client_of(app, **page) as http:
        for method, path in management_calls(app):
            answer = await send(http, method, path)
            assert answer.status_code == 403, path
            if method != "HEAD":
                assert error_of(answer)["code"] == "permission_denied"
            wrong = await send(http, method, path, {"x-impetus-token": TOKEN[:-1]})
            assert wrong.status_code == 403, path
    assert management.calls == []
    async with client_of(app) as http:
        chat = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "still running"}]}
        assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200


@pytest.mark.parametrize("page", PAGES, ids=str)
@pytest.mark.parametrize("credential", CREDENTIALS, ids=str)
async def test_pages_of_allowed_origins_manage_with_the_token(
    page: dict[str, str], credential: dict[str, str]
) -> None:
    app = make_app()
    is_foreign = page.get("origin") in ("https://evil.com", "null")
    async with client_of(app, **page, **credential) as http:
        for method, path in management_calls(app):
            answer = await send(http, method, path)
            assert access_status(answer) == (403 if is_foreign else 200), (path, answer.text)


@pytest.mark.parametrize("key", ["", "dummy"])
async def test_without_a_key_other_clients_read_and_need_a_credential_to_manage(key: str) -> None:
    management = FakeManagement()
    app = make_app(management)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with client_of(app, **headers) as http:
        for method, path in management_calls(app):
            answer = await send(http, method, path)
            assert access_status(answer) == (200 if method in ("GET", "HEAD") else 401), path
        assert management.calls == []
        refused = await http.post("/api/drain", json={})
        assert error_of(refused)["code"] == "invalid_api_key"
        assert "scripts/serve prints" in error_of(refused)["message"]
    for credential in CREDENTIALS:
        app = make_app()
        async with client_of(app, **credential) as http:
            for method, path in management_calls(app):
                assert access_status(await send(http, method, path)) == 200, path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"x-impetus-token": KEY}, 401),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"authorization": f"Bearer {TOKEN}"}, 200),
        ({"x-impetus-token": TOKEN}, 200),
        ({"origin": "http://localhost:5173"}, 401),
        ({"origin": "http://localhost:5173", "x-api-key": KEY}, 200),
    ],
)
async def test_with_a_key_management_needs_the_key_or_the_token(
    headers: dict[str, str], status: int
) -> None:
    app = make_app(api_key=KEY)
    async with client_of(app, **headers) as http:
        for method, path in management_calls(app):
            assert access_status(await send(http, method, path)) == status, path


async def test_the_token_opens_management_only() -> None:
    async with client_of(make_app(api_key=KEY), **CREDENTIALS[0]) as http:
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/healthz")).status_code == 200


async def test_without_a_token_nobody_gets_in() -> None:
    services = replace(make_services(), management=FakeManagement(), management_token="")
    for page, status in (({"origin": "file://"}, 403), ({}, 401)):
        async with client_of(create_app(services), **page) as http:
            for value in ("", "x"):
                answer = await http.post("/api/drain", json={}, headers={"x-impetus-token": value})
                assert answer.status_code == status


async def test_inference_from_editors_needs_no_token() -> None:
    chat = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}
    for origin in ("vscode-webview://1a2b3c", "file://", "http://localhost:5173"):
        async with client_of(make_app(), origin=origin) as http:
            assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200


async def test_path_tricks_reach_no_management_route_n10() -> None:
    management = FakeManagement()
    tricks = ["//api/drain", "/API/drain", "/v1/../api/drain", "/api;/drain", "/api/drain/"]
    async with client_of(make_app(management), origin="file://") as http:
        for path in tricks:
            answer = await http.post(path, json={})
            assert answer.status_code in (403, 404), path
        assert (await http.get("/readyz")).status_code == 200


def test_the_token_is_not_shown(tmp_path: Any) -> None:
    token = read_key(tmp_path, MANAGEMENT_TOKEN)
    services = replace(make_services(home=tmp_path), management_token=token)
    assert token not in repr(services)


async def send(
    http: httpx.AsyncClient, method: str, path: str, headers: dict[str, str] | None = None
) -> httpx.Response:
    """Send an empty JSON body where the method may change something."""
    if method in ("GET", "HEAD"):
        return await http.request(method, path, headers=headers)
    content = json.dumps({}).encode()
    own = {"content-type": "application/json", **(headers or {})}
    return await http.request(method, path, content=content, headers=own)
