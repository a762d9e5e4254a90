"""Every route is called, and its real answers are as the OpenAPI description says."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from catalog.key_store import KeyStore
from core.types import Finished, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from deployments.router.credentials import StoredCredentials
from router.events.hub import EventHub
from scripts.generate_docs import OPENAPI
from tests.fakes import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    MANAGING,
    RERANK_MODEL,
    FakeDispatcher,
)
from tests.live_server import client_of
from tests.sdk.described import CheckedTransport, Description
from tests.unit.router.api.test_router_uploads import ID as UPLOAD
from tests.unit.router.api.test_router_uploads import headers as chunk_headers
from tests.unit.router.events.sources import FakeSources, decision
from tests.unit.router.every_service import make_whole_app
from tests.waiting import wait_until

ONE = f"/api/models/{CHAT_MODEL}"
USER = [{"role": "user", "content": "Hi"}]
CHAT = {"model": CHAT_MODEL, "messages": USER}
TEXT = {"model": CHAT_MODEL, "prompt": "Hi"}
MESSAGE = {**CHAT, "max_tokens": 9}
INPUT = {"model": CHAT_MODEL, "input": "Hi"}
RERANK = {"model": RERANK_MODEL, "query": "q", "documents": ["a", "b"], "return_documents": True}
STREAM = {"stream": True}
ANTHROPIC = {"anthropic-version": "2023-06-01"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
EVENTS = "/api/events"
# What each route answers: method, path, body, status.  In this order: some need what others made.
CALLS: list[tuple[str, str, Any, int]] = [
    ("POST", "/v1/chat/completions", {**CHAT, "tools": [TOOL], "timings_per_token": True}, 200),
    ("POST", "/v1/chat/completions", {**CHAT, **STREAM, "tools": [TOOL]}, 200),
    (
        "POST",
        "/v1/chat/completions",
        {**CHAT, **STREAM, "stream_options": {"include_usage": True}, "timings_per_token": True},
        200,
    ),
    ("POST", "/v1/completions", {**TEXT, "logprobs": 1}, 200),
    ("POST", "/v1/completions", {**TEXT, **STREAM}, 200),
    ("POST", "/v1/messages", MESSAGE, 200),
    ("POST", "/v1/messages", {**MESSAGE, **STREAM}, 200),
    ("POST", "/v1/messages/count_tokens", CHAT, 200),
    ("POST", "/v1/embeddings", {"model": EMBEDDING_MODEL, "input": ["a", "b"]}, 200),
    (
        "POST",
        "/v1/embeddings",
        {"model": EMBEDDING_MODEL, "input": "a", "encoding_format": "base64"},
        200,
    ),
    *(("POST", path, RERANK, 200) for path in ("/v1/rerank", "/v2/rerank", "/rerank")),
    ("POST", "/v1/responses", INPUT, 200),
    ("POST", "/v1/responses", {**INPUT, **STREAM}, 200),
    ("POST", "/v1/responses/input_tokens", INPUT, 200),
    ("GET", "/v1/responses/RESPONSE/input_items", None, 200),
    ("GET", "/v1/responses/RESPONSE", None, 200),
    ("POST", "/v1/responses/RESPONSE/cancel", {}, 400),
    ("DELETE", "/v1/responses/RESPONSE", None, 200),
    ("POST", "/tokenize", {"model": CHAT_MODEL, "content": "Hi"}, 200),
    ("POST", "/tokenize", {**CHAT, "with_pieces": True, "return_token_strs": True}, 200),
    ("POST", "/detokenize", {"model": CHAT_MODEL, "tokens": [72, 105]}, 200),
    ("POST", "/apply-template", CHAT, 200),
    ("GET", "/v1/models", None, 200),
    ("GET", f"/v1/models/{CHAT_MODEL}", None, 200),
    ("GET", "/", None, 200),
    ("GET", "/metrics", None, 200),
    ("GET", "/openapi.json", None, 200),
    *(("GET", path, None, 200) for path in ("/healthz", "/readyz", "/health", "/v1/health")),
    ("GET", "/api/models?tag=a", None, 200),
    ("GET", "/api/models", None, 200),
    ("GET", ONE, None, 200),
    ("PATCH", ONE, {"tags": ["a"], "sampling": {"top_p": 0.5}, "template_kwargs": {"a": [1]}}, 200),
    ("POST", f"{ONE}/check", {"pin": True}, 200),
    ("POST", f"{ONE}/load", None, 200),
    ("POST", f"{ONE}/unload", None, 200),
    ("POST", f"{ONE}/locate", {"path": "/m"}, 200),
    ("DELETE", ONE, None, 200),
    ("GET", "/api/bin", None, 200),
    ("POST", "/api/bin/0000000000000000/restore", None, 200),
    ("DELETE", ONE, None, 200),
    ("DELETE", "/api/bin/0000000000000000", None, 200),
    ("PUT", "/api/aliases/mine", {"model": CHAT_MODEL}, 200),
    ("GET", "/api/aliases", None, 200),
    ("DELETE", "/api/aliases/mine", None, 204),
    ("GET", "/api/connect", None, 200),
    ("GET", "/api/connect/codex", None, 200),
    ("POST", "/api/connect/openai", {}, 400),
    ("POST", "/api/connect/codex", {}, 200),
    ("POST", "/api/connect/openai/check", {}, 200),
    ("GET", "/api/decisions", None, 200),
    ("GET", "/api/jobs", None, 200),
    ("GET", "/api/jobs/a1", None, 200),
    *(("POST", f"/api/jobs/a1/{act}", None, 200) for act in ("pause", "resume", "cancel", "move")),
    ("GET", "/api/downloads", None, 200),
    ("POST", "/api/downloads", {"model": "org/tiny"}, 202),
    ("GET", "/api/downloads/partials", None, 200),
    ("DELETE", "/api/downloads/partials/org/tiny", None, 204),
    ("GET", "/api/downloads/limits", None, 200),
    ("PATCH", "/api/downloads/limits", {"parallel": 2}, 200),
    ("GET", f"/api/convert/choices?model={CHAT_MODEL}", None, 200),
    ("POST", "/api/convert", {"model": CHAT_MODEL, "format": "mlx"}, 202),
    ("GET", "/api/uploads", None, 200),
    ("POST", "/api/uploads", {"files": [{"path": "a.gguf", "size_bytes": 2}]}, 201),
    ("GET", f"/api/uploads/{UPLOAD}", None, 200),
    ("GET", f"/api/uploads/{UPLOAD}/3", None, 200),
    ("PUT", f"/api/uploads/{UPLOAD}/3", b"ab", 200),
    ("POST", f"/api/uploads/{UPLOAD}/finish", None, 202),
    ("DELETE", f"/api/uploads/{UPLOAD}", None, 204),
    ("GET", "/api/fs/browse", None, 200),
    ("GET", "/api/imports", None, 200),
    ("POST", "/api/imports", {"path": "/m/a.gguf", "how": "clone"}, 202),
    ("GET", "/api/folders", None, 200),
    ("DELETE", "/api/folders?path=/m", None, 200),
    ("GET", "/api/hub/search?query=tiny", None, 200),
    ("GET", "/api/hub/resolve?text=org/tiny", None, 200),
    ("GET", "/api/hub/models/org/tiny", None, 200),
    ("GET", "/api/hub/models/org/tiny/readme", None, 200),
    ("GET", "/api/hub/token", None, 200),
    ("POST", "/api/hub/token", {"token": "hf_x"}, 200),
    ("DELETE", "/api/hub/token", None, 200),
    ("POST", "/api/keys", {"name": "a", "scopes": ["read"]}, 201),
    ("GET", "/api/keys", None, 200),
    ("DELETE", "/api/keys/KEY", None, 204),
    ("GET", "/api/session", None, 200),
    ("GET", "/session?code=CODE", None, 303),
    ("POST", "/api/session", {"code": "CODE"}, 204),
    ("DELETE", "/api/session", None, 204),
    ("GET", "/api/state", None, 200),
    ("GET", EVENTS, None, 200),
    ("GET", "/api/logs?level=info", None, 200),
    ("GET", "/api/metrics/series?name=memory&range=24h", None, 200),
    ("GET", "/api/thermal", None, 200),
    ("GET", "/api/settings", None, 200),
    ("PATCH", "/api/settings", {"values": {"threads": 2}, "reset": ["port"]}, 200),
    ("POST", "/api/drain", None, 200),
]
MADE = {"/v1/responses": "RESPONSE", "/api/keys": "KEY"}
ANSWER = (
    ReasoningDelta("Hm."),
    TextDelta("Hello"),
    ToolCallDelta(0, "call_1", "look", '{"at":'),
    ToolCallDelta(0, None, None, ' "x"}'),
    Finished("tool_calls", Usage(7, 4, 3)),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyStore]:
    stored = KeyStore(tmp_path_factory.mktemp("keys") / "keys.sqlite")
    yield stored
    stored.close()


@pytest.fixture(scope="module")
def app(store: KeyStore) -> Iterator[FastAPI]:
    credentials = StoredCredentials(store._path)
    yield make_app(credentials)
    credentials.close()


def make_app(credentials: Any, events: EventHub | None = None, **settings: Any) -> FastAPI:
    return make_whole_app(credentials, FakeDispatcher(*ANSWER), events, **settings)


async def end_stream(hub: EventHub) -> None:
    """Send one event to the reader that comes, then end its stream."""
    await wait_until(lambda: hub._readers, "nobody reads events")
    hub.publish(decision("a"))
    await asyncio.sleep(0)
    hub.close()


def operations(app: FastAPI) -> dict[str, dict[str, Any]]:
    """Return the described operations by their ids."""
    return {
        operation["operationId"]: operation
        for item in app.openapi()["paths"].values()
        for operation in item.values()
    }


async def test_every_route_answers_as_described(
    store: KeyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of clients are written there.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CODEX_HOME", raising=False)
    credentials = StoredCredentials(store._path)
    # Its own: at the end it takes no more requests.
    hub = EventHub(FakeSources())
    app = make_app(credentials, hub)
    described = Description(app.openapi())
    found: dict[str, str] = {}

    def filled(text: str) -> str:
        for name, value in found.items():
            text = text.replace(name, value)
        if "CODE" not in text:
            return text
        return text.replace("CODE", store.create_link_code(now=time.time()))

    transport = CheckedTransport(app, described)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost:8000", headers=MANAGING
    ) as http:
        for method, path, given, status in CALLS:
            sent: dict[str, Any] = {"json": given or {}}
            if isinstance(given, bytes):
                sent = {"content": given, "headers": chunk_headers(given)}
            elif given and "code" in given:
                sent = {"json": {"code": filled(given["code"])}}
            answered = http.request(method, filled(path), **sent)
            if path == EVENTS:
                response, _ = await asyncio.gather(answered, end_stream(hub))
                assert "event: decision" in response.text
            else:
                response = await answered
            assert response.status_code == status, (path, response.text)
            if method == "POST" and path in MADE and "stream" not in given:
                found[MADE[path]] = response.json()["id"]
    credentials.close()
    wanted = {
        (name, int(status))
        for name, operation in operations(app).items()
        for status in operation["responses"]
        if status != "default"
    }
    assert wanted - described.seen == set()
    # No route is left out because a stand-in for its service is missing here.
    documented = json.loads(OPENAPI.read_text())["paths"]
    assert set(app.openapi()["paths"]) == set(documented)


async def test_models_of_anthropic_clients_are_described(app: FastAPI) -> None:
    async with client_of(app, **ANTHROPIC) as http:
        for path in ("/v1/models", f"/v1/models/{CHAT_MODEL}"):
            answer = await http.get(path)
            assert "display_name" in answer.text
        assert (await http.get("/v1/models/unknown")).json()["type"] == "error"


@pytest.mark.parametrize("settings", [{}, {"api_key": "canary-key-1234"}])
async def test_every_refusal_is_described(app: FastAPI, settings: dict[str, Any]) -> None:
    """Each route refuses a foreign Host, and with a key set those that need it a missing one."""
    described = Description(app.openapi())
    if settings:
        app = make_app(NoCredentials(), **settings)
    headers = {} if settings else {"host": "evil.example"}
    async with httpx.AsyncClient(
        transport=CheckedTransport(app, described), base_url="http://localhost:8000"
    ) as http:
        for route in app.routes:
            if not isinstance(route, APIRoute) or not route.include_in_schema:
                continue
            for method in route.methods or ():
                path = route.path_format.replace("{", "").replace("}", "")
                await http.request(method, path, headers=headers)
    is_open = {name for name, one in operations(app).items() if one["x-access"] == "open"}
    refused = {name for name, status in described.seen if status in (401, 403)}
    assert refused >= set(operations(app)) - (is_open if settings else set())


class NoCredentials:
    """No key was created yet, and no session opened."""

    has_keys = False

    def known_key(self, text: bytes) -> None:
        del text

    async def open_session(self, code: str) -> None:
        del code

    async def has_session(self, token: str) -> bool:
        del token
        return False

    async def close_session(self, token: str) -> None:
        del token


MADE_UP = {"error": {"message": "", "type": "server_error", "param": None, "code": "made_up"}}
UNKNOWN = "/api/models/unknown"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", {"messages": 1}, 400),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "unknown"}, 404),
        ("POST", "/v1/completions", {"prompt": {}}, 400),
        ("POST", "/v1/messages", {"messages": USER}, 400),
        ("POST", "/v1/messages", {**MESSAGE, "model": "unknown"}, 404),
        ("POST", "/v1/messages/count_tokens", {}, 400),
        ("POST", "/v1/embeddings", {"input": []}, 400),
        ("POST", "/v1/rerank", {"query": "q"}, 400),
        ("POST", "/v1/responses", {"input": 5}, 400),
        ("POST", "/v1/responses", {**INPUT, "previous_response_id": "resp_x"}, 400),
        ("GET", "/v1/responses/resp_x", None, 404),
        ("GET", "/v1/responses/resp_x/input_items", None, 404),
        ("DELETE", "/v1/responses/resp_x", None, 404),
        ("POST", "/tokenize", {}, 400),
        ("POST", "/detokenize", {"tokens": "x"}, 400),
        ("POST", "/apply-template", {}, 400),
        ("GET", "/v1/models/unknown", None, 404),
        ("GET", UNKNOWN, None, 404),
        ("PATCH", UNKNOWN, {}, 404),
        ("DELETE", UNKNOWN, None, 404),
        ("POST", f"{UNKNOWN}/load", None, 404),
        ("PATCH", ONE, {"pins": True}, 400),
        ("PATCH", ONE, {"context_length": 5000}, 400),
        ("GET", "/api/models?colour=red", None, 400),
        ("POST", "/api/bin/x/restore", None, 404),
        ("DELETE", "/api/bin/x", None, 404),
        ("PUT", "/api/aliases/a", {"model": "unknown"}, 404),
        ("GET", "/api/jobs/x", None, 404),
        ("POST", "/api/jobs/x/pause", None, 404),
        ("POST", "/api/downloads", {}, 400),
        ("PATCH", "/api/downloads/limits", {"parallel": 0}, 400),
        ("GET", "/api/hub/search?limit=0", None, 400),
        ("POST", "/api/keys", {"name": ""}, 400),
        ("POST", "/api/keys", {"name": "a", "scopes": ["fly"]}, 400),
        ("DELETE", "/api/keys/x", None, 404),
        ("GET", "/session?code=x", None, 403),
        ("POST", "/api/session", {"code": "x"}, 403),
        ("GET", "/nowhere", None, 404),
        ("DELETE", "/healthz", None, 405),
    ],
)
async def test_errors_are_described(
    app: FastAPI, method: str, path: str, body: Any, status: int
) -> None:
    async with client_of(app, **MANAGING) as http:
        response = await http.request(method, path, json=body or {})
    assert response.status_code == status, response.text


def answer(status: int, body: Any, content_type: str = "application/json") -> httpx.Response:
    headers = {"content-type": content_type}
    if isinstance(body, bytes):
        return httpx.Response(status, headers=headers, content=body)
    return httpx.Response(status, headers=headers, json=body)


@pytest.mark.parametrize(
    ("path", "response", "fault"),
    [
        ("/healthz", answer(200, {"status": "ok", "extra": 1}), "'extra' was unexpected"),
        ("/healthz", answer(200, {}), "'status' is a required property"),
        ("/healthz", answer(200, b"ok", "text/plain"), "the type 'text/plain' is not described"),
        ("/healthz", answer(201, {"status": "ok"}), "the status 201 is not described"),
        ("/healthz", answer(500, {"error": {}}), "'message' is a required property"),
        ("/api/decisions", answer(200, {"decisions": [{"at": "x"}]}), "str is not of type number"),
        ("/api/decisions", answer(404, MADE_UP), "'made_up' is not one of"),
        (None, answer(404, {"detail": "Not Found"}), "'error' is a required property"),
    ],
)
def test_what_is_not_described_is_found(
    app: FastAPI, path: str | None, response: httpx.Response, fault: str
) -> None:
    found = Description(app.openapi()).deviations(path, "GET", response)
    assert any(fault in one for one in found), found


def test_events_that_are_not_described_are_found(app: FastAPI) -> None:
    body = b'event: x\ndata: {"type":"ping"}\n\ndata: {"type":"pong"}\n\n'
    response = answer(200, body, "text/event-stream")
    found = Description(app.openapi()).deviations("/v1/messages", "POST", response)
    assert found
    good = answer(200, body.partition(b"\n\n")[0], "text/event-stream")
    assert Description(app.openapi()).deviations("/v1/messages", "POST", good) == []
