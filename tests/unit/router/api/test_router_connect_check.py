"""`/api/connect/{client}/check`: a real listener asks itself what a client would."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from catalog.key_store import KeyStore
from deployments.router.credentials import StoredCredentials
from router.app import create_app
from tests.fakes import CHAT_MODEL, MANAGING, make_services
from tests.live_server import serving
from tests.unit.router.api.test_router_api import FakeManagement
from tests.unit.router.api.test_router_connect import BEARER, make_app
from tests.unit.scripts.test_connect_check import CALL, TEXT, Talker


async def checked(
    app: FastAPI, client: str, headers: dict[str, str], body: dict[str, str] | None = None
) -> dict[str, Any]:
    async with serving(app) as port:
        root = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=root, timeout=30, headers=headers) as http:
            answer = await http.post(f"/api/connect/{client}/check", json=body or {})
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found


@pytest.mark.parametrize("client", ["cline", "codex", "claude-code", "openai"])
async def test_the_server_checks_itself_as_each_kind_of_client(client: str) -> None:
    dispatcher = Talker()
    found = await checked(make_app(dispatcher), client, MANAGING)
    assert (found["ok"], found["model"]) == (True, CHAT_MODEL)
    assert [step["name"] for step in found["steps"]] == [
        "model list",
        "stream",
        "tool round trip",
    ]
    assert all(step["ok"] and step["ms"] >= 0 and not step["problem"] for step in found["steps"])
    assert len(dispatcher.requests) == 3


async def test_a_step_that_fails_says_why() -> None:
    found = await checked(make_app(Talker(TEXT)), "cline", MANAGING)
    assert [step["ok"] for step in found["steps"]] == [True, True, False]
    assert (found["ok"], found["steps"][2]["problem"]) == (False, "the model called no tool")


async def test_the_check_uses_the_key_of_the_request_or_the_given_one() -> None:
    app = make_app(Talker(), api_key="sesame-42")
    assert (await checked(app, "cline", BEARER))["ok"] is True
    assert (await checked(app, "cline", {"x-api-key": "sesame-42"}))["ok"] is True
    found = await checked(app, "cline", BEARER, {"key": "wrong-key"})
    assert [step["ok"] for step in found["steps"]] == [False, False, False]
    assert all("HTTP 401" in step["problem"] for step in found["steps"])
    assert "wrong-key" not in json.dumps(found)


async def test_the_check_uses_the_session_of_a_browser(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite")
    credentials = StoredCredentials(tmp_path / "keys.sqlite")
    await credentials.create_key("other", ["inference"], None)
    services = make_services(Talker())
    app = create_app(replace(services, management=FakeManagement(), credentials=credentials))
    token = await credentials.open_session(store.create_link_code(now=time.time()))
    page = {"cookie": f"impetus_session_8000={token}", "sec-fetch-site": "same-origin"}
    found = await checked(app, "cline", page)
    assert [step["problem"] for step in found["steps"]] == ["", "", ""]
    found = await checked(app, "cline", MANAGING)
    assert all("HTTP 401" in step["problem"] for step in found["steps"])
    credentials.close()
    store.close()


async def test_the_check_ends_with_its_caller_and_the_next_one_runs() -> None:
    dispatcher = Talker()
    gate = asyncio.Event()
    dispatcher.call = (gate,)  # type: ignore[assignment]
    app = make_app(dispatcher)
    async with serving(app) as port:
        root = f"http://127.0.0.1:{port}"
        path = "/api/connect/cline/check"
        async with httpx.AsyncClient(base_url=root, headers=MANAGING, timeout=30) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post(path, json={}, timeout=1)
            async with asyncio.timeout(10):
                await dispatcher.idle.wait()
            dispatcher.call = CALL
            assert (await http.post(path, json={})).json()["ok"] is True
