"""Tests of prompt normalization: equal content, equal text; other differences remain."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.echo import ByteTokenizer, echo_info
from backends.prompt.chat_format import ChatFormat
from backends.prompt.normalize import normalize_prompt
from backends.prompt.prepare import Preparer
from core.types import ChatMessage, ChatPrompt, JsonValue, Tool
from tests.requests import request

SCHEMA: Mapping[str, JsonValue] = {
    "type": "object",
    "required": ["path", "mode"],
    "properties": {
        "limit": {"type": "integer", "default": {"b": 1, "a": 2}},
        "mode": {"enum": ["write", "append"], "type": "string"},
        "path": {"type": "string", "description": "where"},
        "default": {"anyOf": [{"type": "null"}, {"minimum": 1, "type": "integer"}]},
    },
}


def prompt(*tools: Tool, system: str = "You are an agent.") -> ChatPrompt:
    return ChatPrompt((ChatMessage("system", system), ChatMessage("user", "hi")), tools)


def written(tools: tuple[Tool, ...]) -> str:
    return json.dumps([[tool.name, tool.description, dict(tool.parameters)] for tool in tools])


def shuffled(value: JsonValue, draw: st.DrawFn) -> JsonValue:
    """Return the value with the keys of its schemas in another order."""
    if isinstance(value, dict):
        keys = draw(st.permutations(sorted(value)))
        return {key: value[key] if key == "default" else shuffled(value[key], draw) for key in keys}
    if isinstance(value, list):
        return [shuffled(each, draw) for each in value]
    return value


@st.composite
def variants(draw: st.DrawFn) -> tuple[Tool, ...]:
    tools = []
    for name in draw(st.permutations(["write", "read", "list"])):
        schema = {key: SCHEMA[key] for key in draw(st.permutations(sorted(SCHEMA)))}
        properties = SCHEMA["properties"]
        assert isinstance(properties, dict)
        names = draw(st.permutations(sorted(properties)))
        schema["properties"] = {each: shuffled(properties[each], draw) for each in names}
        tools.append(Tool(name, f"to {name}", schema))
    return tuple(tools)


@given(variants(), variants())
def test_any_order_of_tools_and_keys_is_one_text(
    one: tuple[Tool, ...], other: tuple[Tool, ...]
) -> None:
    first, second = normalize_prompt(prompt(*one)), normalize_prompt(prompt(*other))
    assert written(first.tools) == written(second.tools)
    assert {tool.name: tool for tool in first.tools} == {tool.name: tool for tool in one}


def test_properties_come_as_required_lists_them() -> None:
    (tool,) = normalize_prompt(prompt(Tool("write", "", SCHEMA))).tools
    properties = tool.parameters["properties"]
    assert isinstance(properties, dict)
    assert list(properties) == ["path", "mode", "default", "limit"]


def test_lists_and_given_values_keep_their_order() -> None:
    (tool,) = normalize_prompt(prompt(Tool("write", "", SCHEMA))).tools
    assert '["write", "append"]' in written((tool,))
    assert '{"b": 1, "a": 2}' in written((tool,))


def test_odd_schemas_are_left_as_they_mean() -> None:
    odd: Mapping[str, JsonValue] = {
        "required": [["x"], 3, "a"], "properties": {"b": True, "a": None}, "type": ["object"],
    }  # fmt: skip
    (tool,) = normalize_prompt(prompt(Tool("t", "", odd))).tools
    assert tool.parameters == odd
    deep: dict[str, JsonValue] = {"type": "string"}
    for _ in range(3000):
        deep = {"items": deep}
    (tool,) = normalize_prompt(prompt(Tool("t", "", deep))).tools
    assert tool.parameters is deep


def test_billing_headers_of_system_prompts_are_left_out() -> None:
    header = "x-anthropic-billing-header: cc_version=2.1; cch=00af3;\n"
    one, other = (
        normalize_prompt(prompt(system=header + "You are an agent.")),
        normalize_prompt(prompt()),
    )
    assert one == other


def test_other_text_and_other_roles_stay() -> None:
    dated = "You are an agent. Today is 2026-11-27.\nx-anthropic-billing-header: 1"
    assert normalize_prompt(prompt(system=dated)) == prompt(system=dated)
    header = "x-anthropic-billing-header: what is this?"
    asked = ChatPrompt((ChatMessage("user", header),))
    assert normalize_prompt(asked) == asked


def test_the_order_of_messages_and_choices_stays() -> None:
    asked = ChatPrompt(
        (ChatMessage("user", "b"), ChatMessage("assistant", "a"), ChatMessage("user", "c")),
        tool_choice="required",
        template_kwargs={"b": 1, "a": 2},
    )
    assert normalize_prompt(asked) == asked


@pytest.mark.parametrize("is_on", [True, False])
def test_the_setting_switches_it_for_prompts_of_a_model(is_on: bool) -> None:
    preparer = Preparer(
        echo_info(),
        ByteTokenizer(),
        ChatFormat(None, "", ""),
        context_tokens=4096,
        stable_prompts=is_on,
    )
    tools = (Tool("write", "", SCHEMA), Tool("read", "", SCHEMA))
    one = preparer.prepare(request(prompt(*tools)))
    other = preparer.prepare(request(prompt(*reversed(tools))))
    assert (one.prompt == other.prompt) == is_on
    preparer.close()
