"""`suffix`: a gap between two texts, for the models that can fill it."""

import pytest

from core.types import Capability, InfillPrompt, TextPrompt
from router.app import create_app
from tests.fakes import CHAT_MODEL, FakeDispatcher, make_services, make_view
from tests.live_server import client_of, error_of

FILLS = make_view(
    capabilities=frozenset({Capability.CHAT, Capability.COMPLETION, Capability.INFILL})
)


@pytest.mark.parametrize("prompt", ["def f(", ["def f("]])
async def test_suffix_makes_a_prompt_with_a_gap(prompt: object) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher, views=[FILLS]))) as client:
        body = {"model": CHAT_MODEL, "prompt": prompt, "suffix": "): pass"}
        answer = (await client.post("/v1/completions", json=body)).json()
        listed = (await client.get(f"/v1/models/{CHAT_MODEL}")).json()
    assert dispatcher.requests[0].prompt == InfillPrompt("def f(", "): pass")
    assert answer["choices"][0]["text"] == "Hello"
    assert listed["capabilities"] == ["chat", "completion", "infill"]


@pytest.mark.parametrize("suffix", ["", None])
async def test_empty_suffix_is_a_plain_prompt(suffix: str | None) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        body = {"model": CHAT_MODEL, "prompt": "x", "suffix": suffix}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert dispatcher.requests[0].prompt == TextPrompt("x")


async def test_model_without_the_tokens_refuses_the_suffix() -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        body = {"model": CHAT_MODEL, "prompt": "x", "suffix": "y"}
        response = await client.post("/v1/completions", json=body)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == "suffix"
    assert "no tokens for filling in the middle" in error["message"]
    assert dispatcher.requests == []
