"""Requests that name no model: the setting's, else the only loaded one that can answer."""

from typing import Any

import pytest

from core.types import Capability
from router.app import create_app
from tests.fakes import FakeDispatcher, make_services, make_view
from tests.live_server import client_of

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
}
VIEWS = (
    make_view("one@gguf-q4_0", state="resident"),
    make_view("two@gguf-q4_0", state="available"),
    make_view(
        "embedder@gguf-q4_0", state="resident", capabilities=frozenset({Capability.EMBEDDING})
    ),
)


@pytest.mark.parametrize("path", BODIES)
async def test_the_only_loaded_model_answers(path: str) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher, views=VIEWS))) as client:
        answer = await client.post(path, json=BODIES[path])
    assert answer.status_code == 200, answer.text
    assert dispatcher.requests[0].model_id == "one@gguf-q4_0"
    assert answer.json()["model"] == "one@gguf-q4_0"


@pytest.mark.parametrize("path", BODIES)
async def test_the_settings_model_goes_before_the_loaded_one(path: str) -> None:
    dispatcher = FakeDispatcher()
    services = make_services(dispatcher, views=VIEWS, default_model="two@gguf-q4_0")
    async with client_of(create_app(services)) as client:
        answer = await client.post(path, json=BODIES[path])
    assert answer.status_code == 200, answer.text
    assert dispatcher.requests[0].model_id == "two@gguf-q4_0"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("loaded", [0, 2])
async def test_without_a_single_loaded_model_the_field_is_required(path: str, loaded: int) -> None:
    states = ["resident"] * loaded + ["available"] * (2 - loaded)
    views = [make_view(f"m{index}@gguf-q4_0", state=state) for index, state in enumerate(states)]
    async with client_of(create_app(make_services(views=views))) as client:
        answer = await client.post(path, json=BODIES[path])
        empty = await client.post(path, json={**BODIES[path], "model": ""})
    assert answer.status_code == empty.status_code == 400
    assert "model" in answer.json()["error"]["message"]
    assert f"{loaded} models" in answer.json()["error"]["message"]
