"""Tests of argument validation, conversion of text arguments, and reasoning effort."""

import json
from typing import Any

import pytest

from backends.answer.reasoning import effort_variables
from backends.prompt.chat_format import ChatFormat
from backends.tool_calls.schemas import argument_checker, from_text, types_of
from core.errors import RequestError, UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, Tool

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 1},
        "name": {"type": "string", "pattern": "(a+)+$"},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["count"],
    "$defs": {"place": {"type": "array", "items": {"type": "number"}}},
}


@pytest.mark.parametrize(
    ("text", "is_fitting"),
    [
        ('{"count": 3}', True),
        ('{"count": 3, "name": "b", "place": [1, 2.5]}', True),
        ('{"count": 3, "name": "' + "a" * 5000 + 'b"}', True),
        ('{"count": 0}', False),
        ('{"count": "3"}', False),
        ('{"name": "a"}', False),
        ('{"count": 3, "place": ["x"]}', False),
        ('{"count": 3', False),
        ("[3]", False),
        ("[" * 100_000, False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_are_checked(text: str, is_fitting: bool) -> None:
    assert argument_checker([Tool("f", "", SCHEMA)])("f", text) is is_fitting


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1:1/x.json"},
        {"type": "nothing"},
        {"type": 3},
        {"properties": 3},
        {"required": 3},
        {"allOf": [{"$ref": "#/$defs/a"}] * 2, "$defs": {"a": {"allOf": [{"$ref": "#"}] * 2}}},
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_i9_what_cannot_be_checked_passes(schema: dict[str, Any]) -> None:
    assert argument_checker([Tool("f", "", schema)])("f", '{"a": 1}')


def many(count: int, last: int | str) -> str:
    """Return arguments whose check takes about `count` steps."""
    return json.dumps({"x": [1] * count + [last]})


def test_what_takes_many_steps_to_check_passes() -> None:
    schema: dict[str, Any] = {"properties": {"x": {"items": {"type": "integer"}}}}
    fits = argument_checker([Tool("f", "", schema)])
    assert not fits("f", many(1500, "a"))
    assert fits("f", many(2500, "a"))
    assert not fits("f", many(1500, "a"))


def test_the_calls_of_one_answer_share_steps() -> None:
    schema: dict[str, Any] = {"properties": {"x": {"items": {"type": "integer"}}}}
    fits = argument_checker([Tool("f", "", schema)])
    for _ in range(12):
        assert not fits("f", many(1500, "a"))
    for _ in range(3):
        assert fits("f", many(1500, 1))
    assert fits("f", many(1500, "a"))
    assert not argument_checker([Tool("f", "", schema)])("f", many(1500, "a"))


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("3", {"integer"}, 3),
        ("3.0", {"integer"}, 3),
        ("3.5", {"integer"}, "3.5"),
        ("3", {"number"}, 3),
        ("3", {"string"}, "3"),
        ("3", {"string", "integer"}, 3),
        ("3", set(), 3),
        (" true\n", {"boolean"}, True),
        ("True", {"boolean"}, True),
        ("yes", {"boolean"}, "yes"),
        ("null", {"string", "null"}, None),
        ("None", {"string", "null"}, None),
        ("none", {"string", "null"}, "none"),
        ('{"a": [1]}', {"object"}, {"a": [1]}),
        ("[1", {"array"}, "[1"),
        ("NaN", {"number"}, "NaN"),
        ("", {"integer"}, ""),
    ],
)
def test_text_becomes_what_its_type_says_and_nothing_else(
    text: str, types: set[str], value: object
) -> None:
    assert from_text(text, frozenset(types)) == value


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"enum": ["a", 1, None, True, 1.5, [], {}]},
         {"string", "integer", "null", "boolean", "number", "array", "object"}),
        ({"const": "a"}, {"string"}),
        ({"anyOf": [{"type": "string"}, {"const": None}]}, {"string", "null"}),
        ({"anyOf": [{"type": "string"}, {}]}, set()),
        ({"$ref": "#/$defs/a"}, {"boolean"}),
        ({"$ref": "#/$defs/loop"}, set()),
        ({"$ref": "#/gone"}, set()),
        (True, set()),
    ],
)  # fmt: skip
def test_types_are_read_from_a_schema(schema: Any, types: set[str]) -> None:
    root: dict[str, Any] = {"$defs": {"a": {"type": "boolean"}, "loop": {"$ref": "#/$defs/loop"}}}
    assert types_of(schema, root) == types


@pytest.mark.parametrize(
    ("template", "effort", "variables"),
    [
        ("{{ reasoning_effort }}", "high", {"reasoning_effort": "high"}),
        ("{% if reasoning_effort == 'none' %}{% endif %}", "none", {"reasoning_effort": "none"}),
        ("{% if enable_thinking is false %}{% endif %}", "none", {"enable_thinking": False}),
        ("{% if thinking is defined and thinking %}{% endif %}", "none", {"thinking": False}),
        ("{{ reasoning_effort }}{{ enable_thinking }}", "none", {"enable_thinking": False}),
        ("{{ x }}", None, {}),
    ],
)
def test_effort_becomes_the_templates_variable(
    template: str, effort: str | None, variables: dict[str, object]
) -> None:
    assert effort_variables(template, effort) == variables


@pytest.mark.parametrize(
    ("template", "effort", "variables"),
    [
        ("{{ x }}", "none", {}),
        ("{{ x }}", "high", {}),
        ("I was thinking", "none", {}),
        ("{{ enable_thinking }}", "high", {"enable_thinking": True}),
        ("{{ reasoning_effort }}", "minimal", {"reasoning_effort": "low"}),
        ("{{ reasoning_effort }}", "none", {"reasoning_effort": "low"}),
        ("{{ reasoning_effort }}", "xhigh", {"reasoning_effort": "high"}),
        (
            "{{ reasoning_effort }}{{ enable_thinking }}",
            "minimal",
            {"enable_thinking": True, "reasoning_effort": "low"},
        ),
    ],
)
def test_effort_that_the_template_does_not_know_is_a_hint(
    template: str, effort: str, variables: dict[str, object]
) -> None:
    assert effort_variables(template, effort) == variables


def asked(**more: Any) -> ChatPrompt:
    return ChatPrompt((ChatMessage("user", "hi"),), **more)


def test_a_budget_needs_a_template_that_marks_reasoning() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        ChatFormat("{{ x }}", "", "").reasoning(asked(reasoning_tokens=5), "")
    assert caught.value.param == "reasoning.max_tokens"
    plan = ChatFormat("[THINK]", "", "").reasoning(asked(reasoning_tokens=5), "x[THINK]\n")
    assert plan is not None
    assert (plan.tags.close, plan.is_open, plan.budget) == ("[/THINK]", True, 5)


@pytest.mark.parametrize(
    ("template", "opening", "closing"),
    [
        ("<think>", "<think>", "</think>"),
        ("<seed:think>", "<seed:think>", "</seed:think>"),
        ("[THINK]", "[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel>thought", "<|channel>thought", "<channel|>"),
        ("◁/think▷", "◁think▷", "◁/think▷"),
    ],
)
def test_reasoning_is_split_off_in_every_familys_tags(
    template: str, opening: str, closing: str
) -> None:
    form = ChatFormat(template, "", "")
    for rendered, answer in (("", f"{opening}\nhm{closing}\n\nYes"), (opening, f"hm{closing}Yes")):
        parser = form.parser(asked(), rendered)
        assert parser is not None
        pieces = [*(piece for char in answer for piece in parser.push(char)), *parser.flush()]
        text = {"ReasoningDelta": "", "TextDelta": ""}
        for piece in pieces:
            text[type(piece).__name__] += getattr(piece, "text", "")
        assert text == {"ReasoningDelta": "hm", "TextDelta": "Yes"}
    assert {opening.encode(), closing.encode()} <= set(form.markers)


def test_a_family_can_be_named_in_the_templates_place() -> None:
    form = ChatFormat("{{ messages }}", "", "", tool_parser="mistral")
    assert form.family.name == "mistral"
    assert b"[TOOL_CALLS]" in form.markers
    with pytest.raises(RequestError) as caught:
        ChatFormat(None, "", "", tool_parser="nobody")
    assert caught.value.param == "tool_parser"
