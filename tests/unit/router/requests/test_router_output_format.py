"""What a request may demand of its answer: forms, reasoning, and tools that are told apart."""

import json
from dataclasses import replace
from typing import Any

import pytest

from core.errors import ImpetusError, RequestError
from core.types import (
    ChoiceOutput,
    GrammarOutput,
    JsonOutput,
    MismatchKind,
    RegexOutput,
    TextDelta,
    ToolCallDelta,
)
from router.app import create_app
from router.requests.body import parse_request
from router.v1.chat.prompt import to_chat_prompt
from router.v1.chat.request import ChatRequest
from router.v1.completions import CompletionRequest
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import client_of

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    return parse_request(
        json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode(), ChatRequest
    )


SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"const": 1}}}


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({}, None),
        ({"guided_regex": "a+"}, RegexOutput("a+", "guided_regex")),
        ({"guided_choice": ["a", "b"]}, ChoiceOutput(("a", "b"), "guided_choice")),
        ({"guided_json": {"type": "object"}}, JsonOutput({"type": "object"})),
        ({"guided_json": '{"type": "object"}'}, JsonOutput({"type": "object"})),
        ({"structured_outputs": {"regex": "a"}}, RegexOutput("a", "structured_outputs.regex")),
        (
            {"structured_outputs": {"choice": ["a"]}},
            ChoiceOutput(("a",), "structured_outputs.choice"),
        ),
        ({"structured_outputs": {"json": {}}}, JsonOutput({})),
        ({"structured_outputs": {"json_object": True}}, JsonOutput(None)),
        ({"structured_outputs": {"json_object": False}}, None),
        (
            {"structured_outputs": {"grammar": "root ::= [a]"}},
            GrammarOutput("root ::= [a]", "structured_outputs.grammar"),
        ),
        ({"guided_grammar": "start: X"}, GrammarOutput("start: X", "guided_grammar")),
        ({"grammar": "root ::= [a]"}, GrammarOutput("root ::= [a]", "grammar")),
        ({"grammar": ""}, None),
        ({"ebnf": "root ::= [a]"}, GrammarOutput("root ::= [a]", "ebnf")),
        ({"grammar": {"type": "json", "value": SCHEMA}}, JsonOutput(SCHEMA)),
        ({"grammar": {"type": "regex", "value": "a"}}, RegexOutput("a", "grammar.value")),
        ({"regex": "a+"}, RegexOutput("a+", "regex")),
        ({"json_schema": SCHEMA}, JsonOutput(SCHEMA)),
        ({"json_schema": json.dumps(SCHEMA)}, JsonOutput(SCHEMA)),
        ({"format": "json"}, JsonOutput(None)),
        ({"format": SCHEMA}, JsonOutput(SCHEMA)),
        ({"format": json.dumps(SCHEMA)}, JsonOutput(SCHEMA)),
        ({"format": ""}, None),
        ({"format": None, "regex": "a"}, RegexOutput("a", "regex")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JsonOutput(SCHEMA)),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, JsonOutput(SCHEMA)),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": SCHEMA}}},
            JsonOutput(SCHEMA),
        ),
        ({"response_format": {"type": "json_object"}}, JsonOutput(None)),
        ({"structured_outputs": {}, "response_format": {"type": "text"}}, None),
    ],
    ids=str,
)
def test_demand_is_read_in_every_form(fields: dict[str, Any], output: object) -> None:
    assert chat(**fields).output() == output
    body = json.dumps({"model": "m", "prompt": "hi", **fields}).encode()
    assert parse_request(body, CompletionRequest).output() == output


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 1_000_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"] * 2000}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"structured_outputs": {"json": {"enum": ["x" * 1_000_000]}}}, "structured_outputs.json"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.regex"),
        ({"grammar": "root ::= [a]", "json_schema": {}}, "grammar"),
        ({"grammar": "a" * 100_000}, "grammar"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar"),
        ({"grammar": {"type": "regex", "value": "a" * 20_000}}, "grammar.value"),
        ({"grammar": {"type": "json", "value": "["}}, "grammar.value"),
        ({"ebnf": "a" * 100_000}, "ebnf"),
        ({"json_schema": "{"}, "json_schema"),
        ({"format": "yaml"}, "format"),
        ({"format": "{"}, "format"),
        ({"format": ["json"]}, "format"),
        ({"format": True}, "format"),
        ({"format": {"enum": ["x" * 1_000_000]}}, "format"),
        ({"format": "json", "response_format": {"type": "json_object"}}, "format"),
        ({"format": "json", "ebnf": "root ::= [a]"}, "ebnf"),
        ({"structural_tag": {"format": {}}}, "structural_tag"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"grammar": "root ::= [a]", "grammar_lazy": True}, "grammar_lazy"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_object", "schema": {"enum": ["x" * 1_000_000]}}},
            "response_format.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "schema": SCHEMA,
                    "json_schema": {"schema": {}},
                }
            },
            "response_format.schema",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_demand_that_is_none_is_refused_i5(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields).output()
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "effort", "bound"),
    [
        ({"reasoning_effort": "high"}, "high", None),
        ({"reasoning": {"effort": "none", "max_tokens": 0}}, "none", 0),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "low"}, "low", None),
        ({"thinking_budget": 100}, None, 100),
        ({}, None, None),
    ],
    ids=str,
)
def test_reasoning_is_read(fields: dict[str, Any], effort: str | None, bound: int | None) -> None:
    prompt = to_chat_prompt(chat(**fields))
    assert (prompt.reasoning_effort, prompt.reasoning_tokens) == (effort, bound)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "utter"}, "reasoning_effort"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"thinking_budget": 1, "reasoning": {"max_tokens": 2}}, "reasoning.max_tokens"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"reasoning": {"max_tokens": 1.5}}, "reasoning.max_tokens"),
    ],
    ids=str,
)
def test_reasoning_that_contradicts_itself_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ImpetusError) as caught:
        to_chat_prompt(chat(**fields))
    assert caught.value.status == 400
    assert getattr(caught.value, "param", None) == param


def test_unknown_inner_fields_are_named() -> None:
    request = chat(
        reasoning={"exclude": True},
        structured_outputs={"regex": "x", "whitespace_pattern": " "},
        response_format={"type": "text", "strict": True, "json_schema": {"title": "x"}},
    )
    assert set(request.ignored_names()) == {
        "reasoning.exclude",
        "structured_outputs.whitespace_pattern",
        "response_format.strict",
        "response_format.json_schema.title",
    }


def test_ten_thousand_tools_are_refused_i9() -> None:
    with pytest.raises(RequestError) as caught:
        chat(tools=[tool(f"f{number}") for number in range(10_000)])
    assert caught.value.param == "tools"


def test_tools_of_one_name_are_refused_i9() -> None:
    with pytest.raises(RequestError) as caught:
        to_chat_prompt(chat(tools=[tool("f"), tool("g"), tool("f")]))
    assert caught.value.param == "tools[2].function.name"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.asyncio
async def test_mismatches_are_counted_by_model_and_kind(stream: bool) -> None:
    kinds: tuple[MismatchKind, ...] = ("schema", "malformed", "schema")
    end = replace(finished("tool_calls"), mismatches=kinds)
    call = ToolCallDelta(0, "c1", "f", '{"a": "x"}')
    app = create_app(make_services(dispatcher=FakeDispatcher(TextDelta("x"), call, end)))
    async with client_of(app) as client:
        body = {"model": CHAT_MODEL, "messages": MESSAGES, "tools": [tool("f")], "stream": stream}
        answer = await client.post("/v1/chat/completions", json=body)
        metrics = (await client.get("/metrics")).text
    assert answer.status_code == 200
    name = "impetus_tool_call_mismatches_total"
    assert f'{name}{{kind="schema",model="{CHAT_MODEL}"}} 2.0' in metrics
    assert f'{name}{{kind="malformed",model="{CHAT_MODEL}"}} 1.0' in metrics
