"""`tool_choice` in the shapes of all APIs, sent to each of them."""

from functools import lru_cache
from typing import Any

import pytest

from core.types import ChatPrompt
from router.app import create_app
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of

FUNCTION = {"name": "read", "parameters": {"type": "object"}}
OTHER = {"name": "write", "parameters": {"type": "object"}}
ASKED = [{"role": "user", "content": "hi"}]
APIS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {
        "messages": ASKED,
        "tools": [{"type": "function", "function": one} for one in (FUNCTION, OTHER)]}),
    "responses": ("/v1/responses", {
        "input": ASKED, "tools": [{"type": "function", **one} for one in (FUNCTION, OTHER)]}),
    "messages": ("/v1/messages", {
        "messages": ASKED, "max_tokens": 9,
        "tools": [{"name": one["name"], "input_schema": {}} for one in (FUNCTION, OTHER)]}),
}  # fmt: skip
OPENAI = ("chat", "responses")


@lru_cache
def served() -> tuple[FakeDispatcher, Any]:
    dispatcher = FakeDispatcher()
    return dispatcher, create_app(make_services(dispatcher))


async def post(api: str, choice: Any, **more: Any) -> tuple[Any, list[Any]]:
    dispatcher, app = served()
    dispatcher.requests.clear()
    path, body = APIS[api]
    async with client_of(app) as client:
        sent = {"model": "tiny", **body, "tool_choice": choice, **more}
        return await client.post(path, json=sent), dispatcher.requests


async def prompt_of(api: str, choice: Any, **more: Any) -> ChatPrompt:
    response, requests = await post(api, choice, **more)
    assert response.status_code == 200, response.text
    assert "x-impetus-ignored" not in response.headers
    prompt = requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ("none", "none"),
        ("auto", "auto"),
        ("required", "required"),
        ("any", "required"),
        ({"type": "none"}, "none"),
        ({"type": "auto"}, "auto"),
        ({"type": "required"}, "required"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "read"}, ("function", "read")),
        ({"type": "function", "name": "read"}, ("function", "read")),
        ({"type": "function", "function": {"name": "read"}}, ("function", "read")),
    ],
)
@pytest.mark.parametrize("api", APIS)
async def test_a_choice_means_the_same_in_every_api(api: str, choice: Any, meant: Any) -> None:
    prompt = await prompt_of(api, choice)
    assert prompt.tool_choice == meant
    assert [tool.name for tool in prompt.tools] == ["read", "write"]


@pytest.mark.parametrize("choice", [{"type": "required", "disable_parallel_tool_use": True}])
async def test_a_single_call_may_be_asked_for_beside_any_shape(choice: Any) -> None:
    assert (await prompt_of("messages", choice)).parallel_tool_calls is False


NESTED_TOOL = {"type": "function", "function": {"name": "read"}}
FLAT_TOOL = {"type": "function", "name": "read"}


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("tool", [NESTED_TOOL, FLAT_TOOL], ids=["nested", "flat"])
@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("api", OPENAI)
async def test_only_allowed_tools_are_offered(
    api: str, tool: dict[str, Any], mode: str, is_nested: bool
) -> None:
    inner = {"mode": mode, "tools": [tool]}
    choice = {"type": "allowed_tools", **({"allowed_tools": inner} if is_nested else inner)}
    prompt = await prompt_of(api, choice)
    assert [tool.name for tool in prompt.tools] == ["read"]
    assert prompt.tool_choice == mode


@pytest.mark.parametrize("api", OPENAI)
async def test_no_tool_is_offered_where_none_of_the_allowed_ones_exists(api: str) -> None:
    inner = {"mode": "auto", "tools": [{"type": "function", "name": "gone"}]}
    assert (await prompt_of(api, {"type": "allowed_tools", **inner})).tools == ()
    response, requests = await post(api, {"type": "allowed_tools", **inner, "mode": "required"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tool_choice")
    assert not requests


@pytest.mark.parametrize(
    "choice",
    [
        "maybe",
        5,
        [],
        {},
        {"type": "function"},
        {"type": "tool"},
        {"type": "function", "name": "gone"},
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "mode": "none", "tools": []},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}},
        {"type": "allowed_tools", "mode": "auto", "tools": [FLAT_TOOL] * 513},
    ],
)
@pytest.mark.parametrize("api", OPENAI)
async def test_what_no_api_has_is_refused_by_name(api: str, choice: Any) -> None:
    response, requests = await post(api, choice)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tool_choice")
    assert not requests
