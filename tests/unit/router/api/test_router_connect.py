"""`/api/connect` over real files in a home of its own, and a real listener for the check."""

import asyncio
import json
import os
import tomllib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from core.types import Capability
from router.app import create_app
from router.clients.clients import CLIENTS
from router.clients.installed import TRACES
from router.services import FitView
from tests.fakes import CHAT_MODEL, MANAGING, FakeDispatcher, make_services, make_view
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement
from tests.unit.scripts.conftest import VARIABLES
from tests.unit.scripts.test_connect import CONTINUE_FILE, FILES

BEARER = {"authorization": "Bearer sesame-42"}
WITH_FILES = sorted(FILES)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setattr("sys.platform", "linux")
    return folder


def make_app(dispatcher: FakeDispatcher | None = None, **settings: Any) -> FastAPI:
    chats = frozenset({Capability.CHAT, Capability.COMPLETION})
    views = [
        make_view(
            CHAT_MODEL, capabilities=chats, compatibility=dict.fromkeys(CLIENTS, FitView("ok"))
        ),
        make_view(
            "short@gguf-f16",
            parameters=10**9,
            capabilities=chats,
            compatibility=dict.fromkeys(CLIENTS, FitView("no", ("the context is 512 tokens",))),
        ),
    ]
    services = make_services(dispatcher, views=views, **settings)
    return create_app(replace(services, management=FakeManagement()))


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(), **MANAGING) as client:
        yield client


async def test_clients_are_listed_with_what_fits_them(http: httpx.AsyncClient, home: Path) -> None:
    (home / "bin").mkdir()
    (home / "bin" / "codex").write_text("#!/bin/sh\n")
    (home / "bin" / "codex").chmod(0o755)
    (home / ".vscode/extensions/rooveterinaryinc.roo-cline-3.1.0").mkdir(parents=True)
    (home / FILES["zed"]).parent.mkdir(parents=True)
    (home / FILES["zed"]).write_text("{}")
    listed = {one["client"]: one for one in (await http.get("/api/connect")).json()["clients"]}
    assert listed.keys() == CLIENTS.keys()
    codex, zed = listed["codex"], listed["zed"]
    assert (codex["is_installed"], codex["found"]) == (True, str(home / "bin" / "codex"))
    assert listed["roo"]["found"].endswith("roo-cline-3.1.0")
    assert (listed["opencode"]["is_installed"], listed["openai"]["is_installed"]) == (False, None)
    assert codex["files"] == [{"path": str(home / FILES["codex"]), "exists": False}]
    assert zed["files"] == [{"path": str(home / FILES["zed"]), "exists": True}]
    assert (codex["recommended"], codex["api"]) == (CHAT_MODEL, "responses")
    assert codex["models"] == [
        {"model": CHAT_MODEL, "level": "ok", "reasons": []},
        {"model": "short@gguf-f16", "level": "no", "reasons": ["the context is 512 tokens"]},
    ]


def test_only_libraries_cannot_be_found() -> None:
    assert set(CLIENTS) - set(TRACES) == {"openai", "langchain"}
    assert set(TRACES) <= set(CLIENTS)


@pytest.mark.parametrize("client", WITH_FILES)
async def test_setup_is_shown_then_written_once(
    client: str, http: httpx.AsyncClient, home: Path
) -> None:
    file = home / FILES[client]
    shown = (await http.get(f"/api/connect/{client}")).json()
    assert (shown["model"], shown["level"], shown["needs_key"]) == (CHAT_MODEL, "ok", False)
    assert shown["url"] == "http://127.0.0.1:8000/v1"
    first = shown["files"][0]
    assert (first["path"], first["exists"], first["is_changed"]) == (str(file), False, True)
    assert f"+++ {file}" in first["diff"]
    assert first["language"] == {"toml": "toml", "json": "json"}.get(file.suffix[1:], "yaml")
    assert list(home.iterdir()) == []

    written = await http.post(f"/api/connect/{client}", json={})
    assert written.status_code == 200, written.text
    assert [one["path"] for one in written.json()["files"]] == [
        one["path"] for one in shown["files"]
    ]
    for one in shown["files"]:
        assert Path(one["path"]).read_text() == one["text"] or client == "cline"
        assert Path(one["path"]).stat().st_mode & 0o077 == 0
    assert CHAT_MODEL in file.read_text()
    again = (await http.post(f"/api/connect/{client}", json={})).json()
    assert all(one["backup"] is None for one in again["files"])
    shown = (await http.get(f"/api/connect/{client}")).json()
    assert all((one["is_changed"], one["diff"]) == (False, "") for one in shown["files"])


async def test_other_entries_stay_and_a_backup_is_kept(http: httpx.AsyncClient, home: Path) -> None:
    file = home / FILES["continue"]
    file.parent.mkdir()
    file.write_text(CONTINUE_FILE)
    file.chmod(0o640)
    shown = (await http.get("/api/connect/continue", params={"model": "tiny"})).json()
    (only,) = shown["files"]
    assert "foreign-secret" not in json.dumps(shown)
    assert "+  - name: tiny" in only["diff"]
    assert [one["name"] for one in yaml.safe_load(only["text"])["models"]] == ["tiny"]
    written = (await http.post("/api/connect/continue", json={"model": "tiny"})).json()
    assert [one["name"] for one in yaml.safe_load(file.read_text())["models"]] == ["Other", "tiny"]
    assert file.read_text().startswith("# My assistant\nname: Mine   # of all things\n")
    assert file.stat().st_mode & 0o777 == 0o640
    backup = Path(written["files"][0]["backup"])
    assert backup.read_text() == CONTINUE_FILE
    assert backup.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("client", "text", "reason"),
    [
        ("codex", "model = \n", "not valid TOML"),
        ("continue", "models: [", "not valid YAML"),
        ("claude-code", "{", "not plain JSON"),
        ("zed", '{"a": }', "not valid JSON"),
        ("opencode", '{"provider": 1}', "structure is not the one"),
        ("aider", "\x00\ufffd: [", "not valid YAML"),
    ],
)
async def test_a_file_that_cannot_be_read_is_told_and_left_alone(
    client: str, text: str, reason: str, http: httpx.AsyncClient, home: Path
) -> None:
    file = home / FILES[client]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    first = (await http.get(f"/api/connect/{client}")).json()["files"][0]
    assert (first["diff"], first["is_changed"]) == (None, None)
    assert reason in first["problem"]
    assert CHAT_MODEL in first["text"]
    refused = await http.post(f"/api/connect/{client}", json={})
    assert refused.status_code == 400
    assert reason in error_of(refused)["message"]
    assert str(file) in error_of(refused)["message"]
    assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


async def test_if_one_file_is_refused_none_is_written(http: httpx.AsyncClient, home: Path) -> None:
    models = home / FILES["llm"]
    models.parent.mkdir(parents=True)
    (models.parent / "keys.json").write_text("[")
    assert (await http.post("/api/connect/llm", json={})).status_code == 400
    assert not models.exists()


async def test_what_is_no_small_file_is_refused(http: httpx.AsyncClient, home: Path) -> None:
    file = home / FILES["codex"]
    file.parent.mkdir()
    os.mkfifo(file)
    refused = await http.post("/api/connect/codex", json={})
    assert "not a regular file" in error_of(refused)["message"]
    file.unlink()
    file.write_text("#" * (4 * 1024 * 1024 + 1))
    refused = await http.post("/api/connect/codex", json={})
    assert "larger than 4.0 MiB" in error_of(refused)["message"]
    assert list(file.parent.iterdir()) == [file]


async def test_a_link_below_the_home_stays_a_link(http: httpx.AsyncClient, home: Path) -> None:
    real, link = home / "dotfiles" / "codex.toml", home / FILES["codex"]
    real.parent.mkdir()
    link.parent.mkdir()
    real.write_text("# mine\n")
    link.symlink_to(real)
    written = (await http.post("/api/connect/codex", json={})).json()
    assert link.is_symlink()
    assert tomllib.loads(real.read_text())["model"] == CHAT_MODEL
    assert Path(written["files"][0]["backup"]).parent == real.parent


async def test_nothing_outside_the_home_is_read_or_written(
    http: httpx.AsyncClient, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.toml").write_text('note = "not yours"\n')
    link = home / FILES["codex"]
    link.parent.mkdir()
    link.symlink_to(outside / "config.toml")
    for _ in range(2):
        (only,) = (await http.get("/api/connect/codex")).json()["files"]
        assert "not below the home folder" in only["problem"]
        assert only["diff"] is None
        refused = await http.post("/api/connect/codex", json={})
        assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_request")
        assert (outside / "config.toml").read_text() == 'note = "not yours"\n'
        monkeypatch.setenv("CODEX_HOME", str(outside))
    assert [path.name for path in outside.iterdir()] == ["config.toml"]


async def test_a_path_that_cannot_be_looked_at_is_told(
    http: httpx.AsyncClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEX_HOME", str(home / ("x" * 300)))
    listed = {one["client"]: one for one in (await http.get("/api/connect")).json()["clients"]}
    assert listed["codex"]["files"][0]["exists"] is False
    (only,) = (await http.get("/api/connect/codex")).json()["files"]
    assert "cannot be read" in only["problem"]
    assert "cannot be read" in error_of(await http.post("/api/connect/codex", json={}))["message"]


async def test_several_writes_at_once_leave_one_whole_file(
    http: httpx.AsyncClient, home: Path
) -> None:
    models = [CHAT_MODEL, "tiny", "short@gguf-f16"] * 2
    writes = (http.post("/api/connect/continue", json={"model": model}) for model in models)
    assert {one.status_code for one in await asyncio.gather(*writes)} == {200}
    found = yaml.safe_load((home / FILES["continue"]).read_text())["models"]
    assert sorted(one["model"] for one in found) == sorted(set(models))


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/api/connect/x"), ("POST", "/api/connect/x"), ("POST", "/api/connect/x/check")],
)
async def test_an_unknown_client_is_not_found(
    method: str, path: str, http: httpx.AsyncClient
) -> None:
    answer = await http.request(method, path, json=None if method == "GET" else {})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    assert "claude-code" in error_of(answer)["message"]


async def test_pages_and_strangers_write_and_read_nothing(home: Path) -> None:
    file = home / FILES["codex"]
    file.parent.mkdir()
    file.write_text('model = "mine"\n')
    page = {"origin": "http://localhost:5173", "sec-fetch-site": "cross-site"}
    async with client_of(make_app()) as http:
        for path in ("/api/connect/codex", "/api/connect/codex/check"):
            assert (await http.post(path, json={}, headers=page)).status_code == 403
            assert (await http.post(path, json={})).status_code == 401
        assert (await http.get("/api/connect/codex", headers=page)).status_code == 403
        (only,) = (await http.get("/api/connect/codex")).json()["files"]
        assert (only["is_changed"], only["diff"], only["problem"]) == (None, None, "")
    assert file.read_text() == 'model = "mine"\n'


@pytest.mark.parametrize("client", sorted(CLIENTS))
async def test_keys_are_shown_to_nobody_and_needed_for_files_that_hold_them(
    client: str, home: Path
) -> None:
    async with client_of(make_app(api_key="sesame-42"), **BEARER) as http:
        shown = await http.get(f"/api/connect/{client}")
        assert shown.json()["needs_key"] is True
        assert "sesame-42" not in shown.text
        if client not in FILES:
            assert "IMPETUS_API_KEY" in shown.json()["text"]
            return
        refused = await http.post(f"/api/connect/{client}", json={})
        if "YOUR_API_KEY" not in shown.text:
            assert (refused.status_code, client in ("codex", "zed", "copilot")) == (200, True)
            return
        assert "needs an API key" in error_of(refused)["message"]
        assert list(home.iterdir()) == []
        written = await http.post(f"/api/connect/{client}", json={"key": "sk-client-1"})
        assert written.status_code == 200, written.text
        assert "sk-client-1" not in written.text
        texts = [Path(one["path"]).read_text() for one in written.json()["files"]]
        assert any("sk-client-1" in text for text in texts)
        assert "sk-client-1" not in (await http.get(f"/api/connect/{client}")).text


async def test_clients_without_a_file_get_a_text_and_steps(http: httpx.AsyncClient) -> None:
    shown = (await http.get("/api/connect/langchain")).json()
    assert (shown["files"], shown["language"]) == ([], "python")
    assert "from langchain_openai import ChatOpenAI" in shown["text"]
    assert "Install langchain-openai" in shown["steps"][0]
    params = {"url": "http://mac.local:9000"}
    shown = (await http.get("/api/connect/openai", params=params)).json()
    assert (shown["language"], shown["url"]) == ("sh", "http://mac.local:9000/v1")
    assert "OPENAI_BASE_URL=http://mac.local:9000/v1" in shown["text"]
    refused = await http.post("/api/connect/openai", json={})
    assert "has no file" in error_of(refused)["message"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"url": "http://a/$(touch x)"}, "url", "invalid_request"),
        ({"url": "file:///etc/passwd"}, "url", "invalid_request"),
        ({"url": "http://"}, "url", "invalid_request"),
        ({"key": "a\nb"}, "key", "invalid_request"),
        ({"key": "k" * 513}, "key", "invalid_request"),
        ({"model": "nobody"}, "model", "model_not_found"),
        ({"path": "/etc/passwd"}, "path", "invalid_request"),
    ],
)
async def test_bad_wishes_are_refused_by_their_field(
    body: dict[str, str], param: str, code: str, http: httpx.AsyncClient, home: Path
) -> None:
    refused = await http.post("/api/connect/codex", json=body)
    assert (error_of(refused)["param"], error_of(refused)["code"]) == (param, code)
    assert list(home.iterdir()) == []


async def test_a_server_without_a_fitting_model_says_so() -> None:
    fit = dict.fromkeys(CLIENTS, FitView("no", ("too short",)))
    services = make_services(views=[make_view(compatibility=fit)])
    app = create_app(replace(services, management=FakeManagement()))
    async with client_of(app, **MANAGING) as http:
        refused = await http.get("/api/connect/codex")
        assert "No model of this server suits codex" in error_of(refused)["message"]
        shown = (await http.get("/api/connect/codex", params={"model": CHAT_MODEL})).json()
        assert (shown["level"], shown["reasons"]) == ("no", ["too short"])
