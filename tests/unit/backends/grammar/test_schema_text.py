"""Tests of the escapes that a model may write in JSON strings under a grammar."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from backends.grammar.schema_text import schema_text


@cache
def grammar(schema: str, *, is_lenient: bool) -> tuple[LLTokenizer, LLMatcher]:
    tokenizer = LLTokenizer("byte")
    text = f"start: %json {schema_text(json.loads(schema), is_lenient=is_lenient)}"
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return tokenizer, matcher


def count_allowed(schema: dict[str, Any], text: str, *, is_lenient: bool = False) -> int:
    """Return how many bytes of `text` the grammar allows; all must also be a complete answer."""
    tokenizer, matcher = grammar(json.dumps(schema), is_lenient=is_lenient)
    copy = matcher.deep_copy()
    count = copy.try_consume_tokens(tokenizer.tokenize_bytes(text.encode()))
    return count if copy.is_accepting() or count < len(text.encode()) else -1


def allows(schema: dict[str, Any], text: str, *, is_lenient: bool = False) -> bool:
    return count_allowed(schema, text, is_lenient=is_lenient) == len(text.encode())


FREE: list[dict[str, Any]] = [
    {},
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    {"type": "object", "additionalProperties": {"type": "string", "minLength": 0}},
    {"type": "object", "additionalProperties": {"type": "string", "maxLength": 50}},
    {"type": "object", "properties": {"b": {"type": "string", "pattern": "^[a-z]+\\.\\d*$"}}},
    {"type": "object", "properties": {"b": {"const": {"pattern": "."}}}},
    {"type": "object", "properties": {"pattern": {"type": "string"}}},
]


@pytest.mark.parametrize("is_lenient", [False, True])
@pytest.mark.parametrize("schema", FREE, ids=str)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), is_ascii=st.booleans())
def test_every_text_may_be_written_escaped_and_not(
    schema: dict[str, Any], is_lenient: bool, text: str, is_ascii: bool
) -> None:
    raw = json.dumps({"a": text}, ensure_ascii=is_ascii).replace("\x7f", "\\u007f")
    assert allows(schema, raw, is_lenient=is_lenient)
    every = "".join(rf"\u{ord(c):04X}" if ord(c) < 0x10000 else c for c in text)
    assert allows(schema, f'{{"a": "{every}"}}', is_lenient=is_lenient)


def test_names_may_be_escaped() -> None:
    assert allows({"type": "object"}, r'{"\u4e16\ud83d\ude00": 1}')


@pytest.mark.parametrize(
    "text", [r'"\ud83d"', r'"\ude00"', r'"\ud83d\u0041"', r'"\ud83dx"', r'"\u12"', r'"\x41"']
)
def test_what_is_no_character_cannot_be_written(text: str) -> None:
    assert not allows({"type": "string"}, text)


WIDE = ["x", "^.+$", "^https://", "^[^a]*$", r"^\S+$", r"^a\$", "^a|b$", "^[!-ÿ]+$", r"^\s*$"]


@pytest.mark.parametrize("is_lenient", [False, True])
@pytest.mark.parametrize("pattern", WIDE)
def test_an_escape_begins_nowhere_if_it_could_only_end_as_a_control_character(
    pattern: str, is_lenient: bool
) -> None:
    patterned = {"type": "string", "pattern": pattern}
    schemas: list[dict[str, Any]] = [
        {"type": "object", "properties": {"a": patterned}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/p"}}, "$defs": {"p": patterned}},
        {"type": "object", "properties": {"a": {"anyOf": [patterned, {"type": "null"}]}}},
    ]
    for schema in schemas:
        for start in ('{"a": "', '{"a": "x', '{"a": "https://'):
            count = count_allowed(schema, start + r"\u00e9", is_lenient=is_lenient)
            assert count <= len(start) + 1


@pytest.mark.parametrize("is_lenient", [False, True])
def test_a_name_with_a_pattern_begins_no_escape(is_lenient: bool) -> None:
    schema = {"type": "object", "patternProperties": {"^a": {"type": "string"}}}
    assert allows(schema, '{"aé": "é"}', is_lenient=is_lenient)
    assert count_allowed(schema, r'{"a\u00e9', is_lenient=is_lenient) <= len('{"a') + 1
