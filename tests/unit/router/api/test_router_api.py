"""The management API: settings, loading and unloading, decisions, and who may use it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from core.errors import ImpetusError, InsufficientMemory, ModelInUse, NotFound, RequestError
from core.types import Capability
from router.api.decisions import MAX_DECISIONS
from router.app import create_app
from router.services import Binned, DecisionView, MemoryPreviewView, SettingsView
from tests.fakes import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    MANAGING,
    RERANK_MODEL,
    make_services,
    make_view,
)
from tests.live_server import client_of, error_of

KEY = "canary-key-1234"
ONE = f"/api/models/{CHAT_MODEL}"
UNSET = {
    "context_length": None,
    "keep_alive_s": None,
    "pin": None,
    "priority": None,
    "max_sequences": None,
    "kv_type": None,
    "tool_parser": None,
    "runtime": None,
    "continue_answers": None,
    "deterministic": None,
    "sampling": None,
    "system_prompt": None,
    "template_kwargs": None,
    "chat_template": None,
    "tags": None,
    "favourite": None,
    "notes": None,
}
WRITES = [("PATCH", ONE), ("POST", f"{ONE}/load"), ("POST", f"{ONE}/unload")]


class FakeManagement:
    """Keeps settings in memory and notes what it was asked."""

    def __init__(self) -> None:
        self.settings: dict[str, SettingsView] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.log: list[DecisionView] = []
        self.problem: ImpetusError | None = None
        self.bin: list[Binned] = []
        self.alias_ids: dict[str, str] = {}
        self.memory: MemoryPreviewView | None = None

    async def settings_of(self, model_ids: Sequence[str]) -> Mapping[str, SettingsView]:
        return {name: self.settings[name] for name in model_ids if name in self.settings}

    async def change_settings(self, model_id: str, changes: Mapping[str, Any]) -> SettingsView:
        self.calls.append(("change", model_id, dict(changes)))
        settings = replace(self.settings.get(model_id, SettingsView()), **changes)
        self.settings[model_id] = settings
        return settings

    async def check_settings(self, model_id: str, changes: Mapping[str, Any]) -> SettingsView:
        return replace(self.settings.get(model_id, SettingsView()), **changes)

    async def preview_memory(
        self, model_id: str, changes: Mapping[str, Any]
    ) -> MemoryPreviewView | None:
        self.calls.append(("preview", model_id, dict(changes)))
        return self.memory

    async def delete_model(self, model_id: str) -> Binned:
        self.calls.append(("delete", model_id))
        if self.problem is not None:
            raise self.problem
        self.bin.append(Binned("0" * 16, model_id, ("tiny.gguf",), 7, 1.5, 2.5))
        return self.bin[-1]

    async def locate_model(self, model_id: str, path: str) -> None:
        self.calls.append(("locate", model_id, path))
        if self.problem is not None:
            raise self.problem

    async def binned(self) -> Sequence[Binned]:
        return self.bin

    async def restore_model(self, entry_id: str) -> Binned:
        self.calls.append(("restore", entry_id))
        return self._taken(entry_id)

    async def purge_model(self, entry_id: str) -> Binned:
        self.calls.append(("purge", entry_id))
        return self._taken(entry_id)

    def _taken(self, entry_id: str) -> Binned:
        found = [one for one in self.bin if one.id == entry_id]
        if not found:
            raise NotFound("There is no such entry.", param="id")
        self.bin.remove(found[0])
        return found[0]

    async def aliases(self) -> Mapping[str, str]:
        return self.alias_ids

    async def set_alias(self, alias: str, model_id: str) -> None:
        self.calls.append(("alias", alias, model_id))
        self.alias_ids[alias] = model_id

    async def remove_alias(self, alias: str) -> None:
        self.calls.append(("remove alias", alias))
        self.alias_ids.pop(alias, None)

    async def load(self, model_id: str) -> None:
        self.calls.append(("load", model_id))
        if self.problem is not None:
            raise self.problem

    async def unload(self, model_id: str) -> None:
        self.calls.append(("unload", model_id))

    async def decisions(self) -> Sequence[DecisionView]:
        return self.log


@pytest.fixture
def management() -> FakeManagement:
    return FakeManagement()


@pytest.fixture
def make_app(management: FakeManagement) -> Callable[..., FastAPI]:
    def make(**settings: Any) -> FastAPI:
        services = make_services(**settings)
        catalog: Any = services.catalog
        catalog.settings = management.settings
        return create_app(replace(services, management=management))

    return make


@pytest.fixture
def ask(make_app: Callable[..., FastAPI]) -> Callable[..., Awaitable[httpx.Response]]:
    async def send(method: str, path: str, **options: Any) -> httpx.Response:
        async with client_of(make_app(), **MANAGING) as client:
            return await client.request(method, path, **options)

    return send


Ask = Callable[..., Awaitable[httpx.Response]]


async def test_list_has_every_model_with_its_settings(ask: Ask, management: FakeManagement) -> None:
    management.settings[EMBEDDING_MODEL] = SettingsView(pin=True)
    models = (await ask("GET", "/api/models")).json()["models"]
    assert [(model["id"], model["state"], model["settings"]) for model in models] == [
        (EMBEDDING_MODEL, "available", {**UNSET, "pin": True}),
        (RERANK_MODEL, "available", UNSET),
        (CHAT_MODEL, "available", UNSET),
    ]


@pytest.mark.parametrize("name", [CHAT_MODEL, "tiny", "tiny%40gguf-q8_0"])
async def test_one_model_is_shown_by_id_and_alias(ask: Ask, name: str) -> None:
    model = (await ask("GET", f"/api/models/{name}")).json()
    assert (model["id"], model["settings"], model["context_length"]) == (CHAT_MODEL, UNSET, 4096)


@pytest.mark.parametrize("name", ["none@gguf", "..", "a/b@c.d", "x" * 600, "load", "%00"])
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("PATCH", ""), ("POST", "/load")])
async def test_unknown_model_is_not_found(
    ask: Ask, management: FakeManagement, name: str, method: str, suffix: str
) -> None:
    body: Any = None if method == "GET" else {}
    path = f"http://localhost:8000/api/models/{name}{suffix}".replace("/..", "/%2E%2E")
    response = await ask(method, path, json=body)
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert management.calls == []


async def test_change_names_the_fields_that_were_sent_and_shows_all(
    ask: Ask, management: FakeManagement
) -> None:
    management.settings[CHAT_MODEL] = SettingsView(pin=True, max_sequences=4)
    changes = {"keep_alive_s": 300, "priority": "batch", "pin": None, "context_length": 4096}
    response = await ask("PATCH", ONE, json=changes)
    assert response.status_code == 200, response.text
    assert response.json()["id"] == CHAT_MODEL
    assert response.json()["settings"] == {**UNSET, **changes, "max_sequences": 4}
    assert management.calls == [("change", CHAT_MODEL, changes)]


async def test_change_of_nothing_changes_nothing(ask: Ask, management: FakeManagement) -> None:
    response = await ask("PATCH", ONE, json={})
    assert (response.status_code, response.json()["settings"]) == (200, UNSET)
    assert management.calls == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_length", 15),
        ("context_length", 4097),
        ("context_length", 10**30),
        ("context_length", "512"),
        ("context_length", 512.0),
        ("context_length", True),
        ("keep_alive_s", -1),
        ("keep_alive_s", -0.001),
        ("keep_alive_s", 1e300),
        ("keep_alive_s", "5m"),
        ("keep_alive_s", True),
        ("pin", 1),
        ("pin", "yes"),
        ("priority", "urgent"),
        ("priority", ["batch"]),
        ("max_sequences", 0),
        ("max_sequences", 257),
        ("tool_parser", ""),
        ("runtime", "tensorflow"),
        ("runtime", True),
        ("continue_answers", 1),
        ("continue_answers", "yes"),
        ("deterministic", "yes"),
        ("deterministic", 1),
        ("max_sequences", {}),
        ("keep_alive", 5),
        ("state", "resident"),
    ],
)
async def test_nonsense_is_refused_by_its_name(
    ask: Ask, management: FakeManagement, field: str, value: Any
) -> None:
    response = await ask("PATCH", ONE, json={"pin": True, field: value})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", field)
    assert error["message"].startswith(f"{field}: ")
    assert management.calls == []


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b"{",
        b'{"pin": true, "pin": false}',
        b'{"keep_alive_s": NaN}',
        b'{"keep_alive_s": Infinity}',
        b'{"keep_alive_s": 1e999}',
        b'{"\\ud83d": 1}',
        b"[" * 60_000,
        b'{"' + b"x" * 60_000 + b'": 1}',
    ],
)
@pytest.mark.parametrize(("method", "path"), WRITES)
async def test_bad_body_is_refused(
    ask: Ask, management: FakeManagement, method: str, path: str, body: bytes
) -> None:
    headers = {"content-type": "application/json"}
    response = await ask(method, path, content=body, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_request")
    assert len(error_of(response)["param"] or "") <= 64
    assert management.calls == []


async def test_large_body_is_refused(ask: Ask, management: FakeManagement) -> None:
    response = await ask("PATCH", ONE, json={"x": "y" * 70_000})
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
    assert management.calls == []


@pytest.mark.parametrize("action", ["load", "unload"])
@pytest.mark.parametrize("content", [b"", b" \n", b"{}"])
async def test_action_runs_on_the_model_and_shows_it(
    ask: Ask, management: FakeManagement, action: str, content: bytes
) -> None:
    headers = {"content-type": "application/json"}
    path = f"/api/models/tiny/{action}"
    response = await ask("POST", path, content=content, headers=headers)
    assert (response.status_code, response.json()["id"]) == (200, CHAT_MODEL)
    assert management.calls == [(action, CHAT_MODEL)]


@pytest.mark.parametrize("action", ["load", "unload"])
async def test_action_takes_no_fields(ask: Ask, management: FakeManagement, action: str) -> None:
    response = await ask("POST", f"{ONE}/{action}", json={"force": True})
    assert (response.status_code, error_of(response)["param"]) == (400, "force")
    assert management.calls == []


async def test_load_that_is_refused_says_why(ask: Ask, management: FakeManagement) -> None:
    management.problem = InsufficientMemory("It needs 9 GiB.", param="model", retry_after_s=7)
    response = await ask("POST", f"{ONE}/load", json={})
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    assert error_of(response)["code"] == "insufficient_memory"


async def test_a_draft_tells_the_memory_that_it_would_take(
    ask: Ask, management: FakeManagement
) -> None:
    management.memory = MemoryPreviewView(
        "after_unloading", "", ("other",), 512, 100, 20, 3, 1000, 900, 950
    )
    answer = await ask("POST", f"{ONE}/check", json={"context_length": 512, "pin": True})
    assert answer.status_code == 200
    assert answer.json()["memory"] == {
        "fit": "after_unloading", "reason": "", "evicts": ["other"], "context_tokens": 512,
        "weights_bytes": 100, "kv_bytes": 20, "overhead_bytes": 3, "needed_bytes": 123,
        "budget_bytes": 1000, "held_bytes": 900, "limit_bytes": 950,
    }  # fmt: skip
    assert management.calls == [("preview", CHAT_MODEL, {"context_length": 512, "pin": True})]
    management.memory = None
    assert (await ask("POST", f"{ONE}/check", json={})).json()["memory"] is None


async def test_p7_a_missing_model_is_located(ask: Ask, management: FakeManagement) -> None:
    answer = await ask("POST", f"{ONE}/locate", json={"path": "/models/a.gguf"})
    assert (answer.status_code, answer.json()["id"]) == (200, CHAT_MODEL)
    assert management.calls == [("locate", CHAT_MODEL, "/models/a.gguf")]
    for body in ({}, {"path": ""}, {"path": "/" * 4097}, {"path": "/a", "force": True}):
        refused = await ask("POST", f"{ONE}/locate", json=body)
        assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_request")
    management.problem = RequestError("path: /a does not exist.", param="path")
    refused = await ask("POST", f"{ONE}/locate", json={"path": "/a"})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "path")


async def test_id_with_a_slash_reaches_its_own_actions(management: FakeManagement) -> None:
    name = "org/big.v1.5@gguf-q4_0"
    view = make_view(name, capabilities=frozenset({Capability.CHAT}))
    services = replace(make_services(views=(view,)), management=management)
    async with client_of(create_app(services), **MANAGING) as client:
        shown = await client.get(f"/api/models/{name}")
        loaded = await client.post(f"/api/models/{name}/load", json={})
    assert (shown.json()["id"], loaded.json()["id"]) == (name, name)
    assert management.calls == [("load", name)]


async def test_decisions_come_newest_first_and_bounded(
    ask: Ask, management: FakeManagement
) -> None:
    management.log = [
        DecisionView(float(at), "load wanted", "load", f"reason {at}")
        for at in range(MAX_DECISIONS + 5)
    ]
    decisions = (await ask("GET", "/api/decisions")).json()["decisions"]
    assert len(decisions) == MAX_DECISIONS
    newest = MAX_DECISIONS + 4
    assert decisions[0] == {
        "at": float(newest),
        "event": "load wanted",
        "action": "load",
        "reason": f"reason {newest}",
    }
    assert decisions[-1]["at"] == 5.0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", ONE),
        ("PUT", ONE),
        ("DELETE", "/api/models"),
        ("POST", "/api/models"),
        ("PATCH", "/api/x"),
    ],
)
async def test_nothing_else_is_there(ask: Ask, method: str, path: str) -> None:
    response = await ask(method, path, json={})
    assert response.status_code == (404 if path == "/api/x" else 405)
    error_of(response)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/models"), ("GET", ONE), ("GET", "/api/decisions"), *WRITES]
)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": f"Bearer {KEY}", "host": "evil.com"}, 403),
        ({"authorization": f"Bearer {KEY}", "origin": "https://evil.com"}, 403),
        ({"authorization": f"Bearer {KEY}", "sec-fetch-site": "cross-site"}, 403),
    ],
)
async def test_guards_hold_for_every_path(
    make_app: Callable[..., FastAPI],
    management: FakeManagement,
    method: str,
    path: str,
    headers: dict[str, str],
    status: int,
) -> None:
    async with client_of(make_app(api_key=KEY)) as client:
        body: Any = None if method == "GET" else {}
        response = await client.request(method, path, json=body, headers=headers)
    assert response.status_code == status
    if status != 200:
        assert management.calls == []


@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"],
)
async def test_form_of_another_site_cannot_write(
    ask: Ask, management: FakeManagement, method: str, path: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await ask(method, path, content=b"{}", headers=headers)
    assert response.status_code == 415
    assert management.calls == []


async def test_without_management_there_is_no_api() -> None:
    async with client_of(create_app(make_services())) as client:
        assert (await client.get("/api/models")).status_code == 404


async def test_deleted_model_is_in_the_bin_until_it_is_restored(
    ask: Ask, management: FakeManagement
) -> None:
    entry = {
        "id": "0" * 16,
        "model": CHAT_MODEL,
        "paths": ["tiny.gguf"],
        "freed_bytes": 7,
        "deleted_at": 1,
        "purge_at": 2,
    }
    answer = await ask("DELETE", ONE)
    assert (answer.status_code, answer.json()) == (200, entry)
    assert (await ask("GET", "/api/bin")).json() == {"models": [entry], "freed_bytes": 7}
    place = f"/api/bin/{entry['id']}"
    assert (await ask("POST", f"{place}/restore", json={})).json() == entry
    gone = await ask("DELETE", place)
    assert (gone.status_code, error_of(gone)["code"]) == (404, "not_found")
    management.problem = ModelInUse("It is in use.")
    busy = await ask("DELETE", ONE)
    assert (busy.status_code, error_of(busy)["code"]) == (409, "model_in_use")
