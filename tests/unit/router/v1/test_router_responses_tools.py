"""Tools of the Responses API: namespaces, custom tools, and tools that only OpenAI can run."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response as ResponseObject
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from core.types import ChatPrompt, GenerationEvent, ToolCall, ToolCallDelta
from router.app import create_app
from router.requests.custom_input import CustomInput, to_arguments, to_custom_input
from tests.fakes import FakeDispatcher, finished, make_services
from tests.live_server import client_of, error_of

BODY: dict[str, Any] = {"model": "tiny", "input": "hi"}
READ = {"type": "function", "name": "read", "parameters": {"type": "object"}, "strict": False}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files."}
AGENTS = {
    "type": "namespace",
    "name": "agents",
    "description": "Other agents.",
    "tools": [{**READ, "name": "spawn"}, {**PATCH, "name": "tell"}],
}
MCP = {"type": "namespace", "name": "mcp__files__", "description": "", "tools": [READ]}
SEARCH = {"type": "web_search", "external_web_access": False, "name": 5}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


async def posted(fields: dict[str, Any], *script: GenerationEvent) -> tuple[Any, FakeDispatcher]:
    dispatcher = FakeDispatcher(*(script or (finished(),)))
    async with client_of(create_app(make_services(dispatcher))) as client:
        return await client.post("/v1/responses", json={**BODY, **fields}), dispatcher


def prompt_of(dispatcher: FakeDispatcher) -> ChatPrompt:
    prompt = dispatcher.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def test_tools_of_codex_are_offered_or_named() -> None:
    tools = [READ, SEARCH, AGENTS, MCP, PATCH, {"type": "new_kind", "tools": "x"}]
    response, dispatcher = await posted({"tools": tools, "tool_choice": "auto"})
    assert response.status_code == 200
    assert response.headers["x-impetus-ignored"] == "tools[1], tools[5]"
    prompt = prompt_of(dispatcher)
    assert [tool.name for tool in prompt.tools] == [
        "read", "agents__spawn", "agents__tell", "mcp__files__read", "apply_patch",
    ]  # fmt: skip
    assert prompt.tools[1].description == "Other agents."
    assert prompt.tools[4].parameters["required"] == ["input"]
    shown = ResponseObject.model_validate(response.json()).tools
    assert [tool.type for tool in shown] == ["function", "namespace", "namespace", "custom"]
    # OpenAI's description allows no null in the tools of a namespace.
    inner = [one for tool in response.json()["tools"] for one in tool.get("tools", ())]
    assert len(inner) == 3
    assert all(one.get("description", "") is not None for one in inner)


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_come_back_in_the_form_of_their_tool(stream: bool) -> None:
    text = 'a "b"\n\tü \U0001f600'
    script: tuple[GenerationEvent, ...] = (
        ToolCallDelta(0, "c1", "agents__spawn", "{}"),
        ToolCallDelta(1, "c2", "apply_patch"),
        *(ToolCallDelta(1, arguments=char) for char in to_arguments(text)),
        ToolCallDelta(2, "c3", "agents__tell", '{"input": "\\u00fc"}'),
        ToolCallDelta(3, "c4", "mcp__files__read", '{"a": 1}'),
        finished(),
    )
    response, _ = await posted({"tools": [AGENTS, MCP, PATCH], "stream": stream}, *script)
    body: Any = response.json() if not stream else None
    if stream:
        events = [
            json.loads(line.removeprefix("data: "))
            for line in response.text.splitlines()
            if line.startswith("data: ")
        ]
        for event in events:
            EVENT.validate_python(event)
        body = events[-1]["response"]
        done = [one["item"] for one in events if one["type"] == "response.output_item.done"]
        assert done == body["output"]
        inputs = [one for one in events if "custom_tool_call_input" in one["type"]]
        kind = "response.custom_tool_call_input"
        assert [(one["type"], one.get("delta", one.get("input"))) for one in inputs] == [
            *((f"{kind}.delta", char) for char in text),
            (f"{kind}.done", text),
            (f"{kind}.delta", "ü"),
            (f"{kind}.done", "ü"),
        ]
    ResponseObject.model_validate(body)
    shown = [
        (
            item["type"],
            item.get("namespace"),
            item["name"],
            item.get("input", item.get("arguments")),
        )
        for item in body["output"]
    ]
    assert shown == [
        ("function_call", "agents", "spawn", "{}"),
        ("custom_tool_call", None, "apply_patch", text),
        ("custom_tool_call", "agents", "tell", "ü"),
        ("function_call", "mcp__files__", "read", '{"a": 1}'),
    ]


async def test_calls_in_a_history_have_the_names_that_the_model_was_offered() -> None:
    items = [
        {"role": "user", "content": "go"},
        {"type": "function_call", "call_id": "c1", "namespace": "agents", "name": "spawn",
         "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": 'x"\n'},
        {"type": "function_call_output", "call_id": "c1", "output": "ok"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [
            {"type": "input_text", "text": "done"}]},
    ]  # fmt: skip
    response, dispatcher = await posted({"input": items, "tools": [AGENTS, PATCH]})
    assert response.status_code == 200
    _, calls, first, second = prompt_of(dispatcher).messages
    assert calls.tool_calls == (
        ToolCall("c1", "agents__spawn", "{}"),
        ToolCall("c2", "apply_patch", '{"input": "x\\"\\n"}'),
    )
    assert (first.tool_call_id, first.content) == ("c1", "ok")
    assert (second.tool_call_id, second.content) == ("c2", "done")


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        ({"type": "auto"}, "auto", 5),
        ({"type": "none"}, "none", 5),
        ({"type": "custom", "name": "apply_patch"}, ("function", "apply_patch"), 5),
        ({"type": "function", "name": "spawn"}, ("function", "agents__spawn"), 5),
        ({"type": "function", "name": "read"}, ("function", "read"), 5),
        ({"type": "function", "name": "read", "namespace": "mcp__files__"},
         ("function", "mcp__files__read"), 5),
        ({"type": "allowed_tools", "mode": "required", "tools": [
            {"type": "function", "name": "read"}, {"type": "web_search"}]},
         "required", ["read", "mcp__files__read"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "namespace", "name": "agents"}, {"type": "custom", "name": "apply_patch"}]},
         "auto", ["agents__spawn", "agents__tell", "apply_patch"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "auto", []),
    ],
)  # fmt: skip
async def test_tool_choice_names_tools_as_the_client_knows_them(
    choice: Any, expected: Any, names: Any
) -> None:
    tools = [READ, SEARCH, AGENTS, MCP, PATCH]
    response, dispatcher = await posted({"tools": tools, "tool_choice": choice})
    assert response.status_code == 200
    prompt = prompt_of(dispatcher)
    assert prompt.tool_choice == expected
    offered = [tool.name for tool in prompt.tools]
    assert offered == names or len(offered) == names
    ResponseObject.model_validate(response.json())


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [READ, SEARCH], "tool_choice": {"type": "web_search"}},
         "unsupported_parameter", "tool_choice"),
        ({"tools": [SEARCH], "tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"tools": [READ], "tool_choice": {"type": "custom", "name": "read"}},
         "invalid_request", "tool_choice"),
        ({"tools": [READ, SEARCH], "tool_choice": {"type": "allowed_tools", "mode": "required",
          "tools": [{"type": "web_search"}]}}, "unsupported_parameter", "tool_choice"),
        ({"tools": [AGENTS, {**MCP, "name": "x", "tools": [{**READ, "name": "spawn"}]}],
          "tool_choice": {"type": "function", "name": "spawn"}}, "invalid_request", "tool_choice"),
        ({"tools": [AGENTS, {**READ, "name": "agents__spawn"}]}, "invalid_request",
         "tools[1].name"),
        ({"tools": [SEARCH, READ, AGENTS, READ]}, "invalid_request", "tools[3].name"),
        ({"tools": [{"type": "namespace", "tools": [READ]}]}, "invalid_request", "tools[0].name"),
        ({"tools": [{**PATCH, "format": {"type": "grammar", "syntax": "regex"}}]},
         "invalid_request", "tools[0].format.definition"),
        ({"tools": [{**PATCH, "format": {"type": "grammar", "syntax": "regex",
          "definition": "a" * 16_385}}]}, "invalid_request", "tools[0].format.definition"),
        ({"tools": [{**AGENTS, "name": f"n{number}", "tools": [
            {**READ, "name": f"t{index}"} for index in range(200)]} for number in range(3)]},
         "invalid_request", "tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": ["x"]}},
         "invalid_request", "tool_choice"),
    ],
)  # fmt: skip
async def test_tools_that_cannot_be_meant_are_refused(
    fields: dict[str, Any], code: str, param: str
) -> None:
    response, dispatcher = await posted(fields)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert dispatcher.requests == []


async def test_regex_of_a_custom_tool_becomes_its_texts_pattern() -> None:
    form = {"type": "grammar", "syntax": "regex", "definition": "a|b"}
    response, dispatcher = await posted({"tools": [{**PATCH, "format": form}]})
    assert "x-impetus-ignored" not in response.headers
    (tool,) = prompt_of(dispatcher).tools
    assert tool.parameters["properties"] == {"input": {"type": "string", "pattern": "^(?:a|b)$"}}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('{"patch": "a"}', "a"),
        ('{"input": "a", "b": "c"}', "a"),
        ('{"a": "b", "c": "d"}', '{"a": "b", "c": "d"}'),
        ('"alone"', "alone"),
        ("not JSON", "not JSON"),
        ('{"input": "cut at \\', "cut at "),
        ('{"input": "cut \\u00', "cut "),
        ('{"input": "\\ud83d\\ude', "\ufffd"),
        ('{"input": "\\ud83d\\ud83d\\ude00x"}', "\ufffd\U0001f600x"),
        ('{"input": "\\ude00\\ud83d"}', "\ufffd\ufffd"),
        ('{"input": "\\q \\u12x"}', "\\q \\u12x"),
        ('{"input": "a" and more', "a"),
        ('{"input": ', '{"input": '),
        ("", ""),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_input_of_a_custom_call_is_found_in_any_arguments(arguments: str, text: str) -> None:
    assert to_custom_input(arguments) == text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    is_ascii=st.booleans(),
    cuts=st.lists(st.integers(0, 300), max_size=8),
    end=st.integers(0, 300),
)
def test_pieces_of_a_custom_input_are_the_text(
    text: str, is_ascii: bool, cuts: list[int], end: int
) -> None:
    whole = json.dumps({"input": text}, ensure_ascii=is_ascii)
    assert to_custom_input(whole) == text
    for arguments in (whole, whole[:end]):
        at = sorted({0, len(arguments), *(cut for cut in cuts if cut < len(arguments))})
        reader = CustomInput()
        pushed = [reader.push(arguments[i:j]) for i, j in itertools.pairwise(at)]
        if reader.has_begun:
            assert "".join(pushed) + reader.finish() == to_custom_input(arguments)
        else:
            assert not any(pushed)
        assert text.startswith("".join(pushed))


@pytest.mark.parametrize(
    ("pieces", "deltas", "text"),
    [
        (('{"patch":', ' "a"}'), ["a"], "a"),
        (("no", "thing"), ["nothing"], "nothing"),
        (("", '{"input": "a'), ["a"], "a"),
        (('{"input": "\\ud8', "3d"), ["\ufffd"], "\ufffd"),
        (('{"input": "\\ud83d', "\\ude00"), ["\U0001f600"], "\U0001f600"),
        (('{"input": "ab', 'c", "input": "d"}'), ["ab", "c"], "abc"),
        (('{"input": ""', "}"), [], ""),
        ((" " * 3000, '{"input": "a"}'), ["a"], "a"),
    ],
)
async def test_a_custom_tools_text_is_streamed_as_far_as_it_is_known(
    pieces: tuple[str, ...], deltas: list[str], text: str
) -> None:
    script = [
        ToolCallDelta(0, "c", "apply_patch"),
        *(ToolCallDelta(0, arguments=p) for p in pieces),
    ]
    response, _ = await posted({"tools": [PATCH], "stream": True}, *script, finished("length"))
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    for event in events:
        EVENT.validate_python(event)
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    kind = "response.custom_tool_call_input"
    assert [one["delta"] for one in events if one["type"] == f"{kind}.delta"] == deltas
    assert [one["input"] for one in events if one["type"] == f"{kind}.done"] == [text]
    assert events[-1]["response"]["output"][0]["input"] == text
