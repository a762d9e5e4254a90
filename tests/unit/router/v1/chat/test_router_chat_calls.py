"""Calls of custom tools and of the older `functions` in chat completions, both ways."""

from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from core.types import (
    ChatMessage,
    ChatPrompt,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from router.app import create_app
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of, sse_data

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
PATCH: dict[str, Any] = {"type": "custom", "custom": {"name": "patch", "description": "Patches."}}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
END = Finished("tool_calls", Usage(7, 5))
MIXED = (
    ReasoningDelta("hm"),
    ToolCallDelta(0, "call_1", "patch", '{"inp'),
    ToolCallDelta(0, arguments='ut": "a\\n\\"b\\""}'),
    ToolCallDelta(1, "call_2", "weather", "{}"),
    ToolCallDelta(2, "call_3", "patch", '{"input": "c"}'),
    END,
)
SHOWN = [
    {"id": "call_1", "type": "custom", "custom": {"name": "patch", "input": 'a\n"b"'}},
    {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    {"id": "call_3", "type": "custom", "custom": {"name": "patch", "input": "c"}},
]


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher(*MIXED)


@pytest.fixture
async def client(dispatcher: FakeDispatcher) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with client_of(create_app(make_services(dispatcher))) as one:
        yield one


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    response = await client.post(PATH, json={"model": "tiny", "messages": [USER], **fields})
    assert response.status_code == 200, response.text
    return response


def prompt_of(dispatcher: FakeDispatcher) -> ChatPrompt:
    prompt = dispatcher.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def deltas(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    chunks = sse_data((await ask(client, stream=True, **fields)).text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [*(choice["delta"] for choice in choices), {"end": choices[-1]["finish_reason"]}]


async def test_call_of_a_custom_tool_is_given_back_as_its_text(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, tools=[PATCH, WEATHER])).json()["choices"][0]
    assert choice["message"]["tool_calls"] == SHOWN
    assert choice["finish_reason"] == "tool_calls"
    *found, end = await deltas(client, tools=[PATCH, WEATHER])
    calls = [call for delta in found for call in delta.get("tool_calls", ())]
    assert joined(calls) == SHOWN

    assert end == {"end": "tool_calls"}


def joined(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the deltas of calls together, as clients do."""
    whole: dict[int, dict[str, Any]] = {}
    for call in calls:
        index = call.pop("index")
        if index not in whole:
            whole[index] = call
        else:
            whole[index]["custom"]["input"] += call["custom"]["input"]
    return [call for _, call in sorted(whole.items())]


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        (['{"input": "a', "b", "\\u00", 'e9"}'], ["", "a", "b", "é"]),
        (['{"input": "a\\ud83d'], ["", "a", "\ufffd"]),
        (["plain ", "text"], ["", "plain text"]),
        (['{"text": "a', 'b"}'], ["", "ab"]),
        ([""], [""]),
    ],
)
async def test_text_of_a_custom_tool_is_streamed_as_it_is_written(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher, pieces: list[str], texts: list[str]
) -> None:
    first, *more = pieces
    begun = ToolCallDelta(0, "call_1", "patch", first)
    dispatcher.script = (begun, *(ToolCallDelta(0, arguments=each) for each in more), END)
    found = await deltas(client, tools=[PATCH])
    calls = [call for delta in found for call in delta.get("tool_calls", ())]
    assert [call["custom"]["input"] for call in calls] == texts
    choice = (await ask(client, tools=[PATCH])).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["custom"]["input"] == "".join(texts)


async def test_text_after_a_custom_call_comes_after_it(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    call = ToolCallDelta(0, "call_1", "patch", '{"input": "a"}')
    dispatcher.script = (call, ReasoningDelta("so"), TextDelta("done"), END)
    *found, _ = await deltas(client, tools=[PATCH])
    kinds = [next(iter(delta), None) for delta in found]
    assert kinds == [
        "role", "tool_calls", "tool_calls", "reasoning_content", "content", None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "pattern", "ignored"),
    [
        (None, None, None),
        ({"type": "text"}, None, None),
        ({"type": "grammar", "grammar": {"syntax": "regex", "definition": "[ab]+"}},
         "^(?:[ab]+)$", None),
        ({"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "a" start "b"'}},
         None, "tools[0].custom.format"),
    ],
)  # fmt: skip
async def test_custom_tool_is_offered_as_a_function_with_one_text(
    client: httpx.AsyncClient,
    dispatcher: FakeDispatcher,
    form: Any,
    pattern: str | None,
    ignored: str | None,
) -> None:
    tool = {"type": "custom", "custom": {**PATCH["custom"], **({"format": form} if form else {})}}
    choice = {"type": "custom", "custom": {"name": "patch"}}
    response = await ask(client, tools=[tool], tool_choice=choice)
    assert response.headers.get("x-impetus-ignored") == ignored
    prompt = prompt_of(dispatcher)
    assert prompt.tool_choice == ("function", "patch")
    (offered,) = prompt.tools
    assert offered.description.startswith("Patches.")
    assert offered.parameters["required"] == ["input"]
    properties: Any = offered.parameters["properties"]
    assert properties["input"].get("pattern") == pattern


@pytest.mark.parametrize(
    "form",
    [
        {"type": "grammar"},
        {"type": "grammar", "grammar": {"syntax": "regex"}},
        {"type": "grammar", "grammar": {"syntax": "lark", "definition": "x" * 65_537}},
        {"type": "grammar", "grammar": {"syntax": "peg", "definition": "x"}},
    ],
)
async def test_format_of_a_custom_tool_without_a_grammar_is_refused(
    client: httpx.AsyncClient, form: Any
) -> None:
    tool = {"type": "custom", "custom": {"name": "patch", "format": form}}
    body = {"model": "tiny", "messages": [USER], "tools": [tool]}
    response = await client.post(PATH, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tools[0].custom.format.grammar")


async def test_tools_of_servers_are_left_out_and_named(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    response = await ask(client, tools=[{"type": "web_search"}, WEATHER, PATCH])
    assert response.headers["x-impetus-ignored"] == "tools[0]"
    assert [tool.name for tool in prompt_of(dispatcher).tools] == ["weather", "patch"]


async def test_functions_are_answered_in_their_older_form(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (
        ToolCallDelta(0, "call_1", "weather", '{"city": '),
        ToolCallDelta(0, arguments='"Köln"}'),
        END,
    )
    function = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
    choice = (await ask(client, functions=[function])).json()["choices"][0]
    called = {"name": "weather", "arguments": '{"city": "Köln"}'}
    assert choice["message"]["function_call"] == called
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "function_call"
    prompt = prompt_of(dispatcher)
    assert (prompt.tools[0].name, prompt.parallel_tool_calls) == ("weather", False)

    *found, end = await deltas(client, functions=[function], function_call="auto")
    calls = [delta["function_call"] for delta in found if "function_call" in delta]
    assert [call.get("name") for call in calls] == ["weather", None]
    assert "".join(call["arguments"] for call in calls) == called["arguments"]
    assert end == {"end": "function_call"}


@pytest.mark.parametrize(
    ("sent", "meant"),
    [("auto", "auto"), ("none", "none"), ({"name": "weather"}, ("function", "weather"))],
)
async def test_function_call_is_the_choice_of_a_function(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher, sent: Any, meant: Any
) -> None:
    await ask(client, functions=[{"name": "weather"}], function_call=sent)
    assert prompt_of(dispatcher).tool_choice == meant


async def test_results_of_the_older_form_are_read(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    called = {"role": "assistant", "content": None,
              "function_call": {"name": "weather", "arguments": "{}"}}  # fmt: skip
    result = {"role": "function", "name": "weather", "content": "rain"}
    await ask(client, messages=[USER, called, result])
    assert prompt_of(dispatcher).messages[1:] == (
        ChatMessage("assistant", "", tool_calls=(ToolCall("", "weather", "{}"),)),
        ChatMessage("tool", "rain", name="weather"),
    )


async def test_call_of_a_custom_tool_in_a_history_is_read(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [SHOWN[0]]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "done"}
    await ask(client, messages=[USER, called, result], tools=[PATCH])
    (call,) = prompt_of(dispatcher).messages[1].tool_calls
    assert (call.name, call.arguments) == ("patch", '{"input": "a\\n\\"b\\""}')
