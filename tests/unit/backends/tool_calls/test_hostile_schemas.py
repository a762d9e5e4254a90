"""Tools with any names and schemas: building grammars and parsers raises API errors only."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.tool_calls.bare_call_grammar import bare_call_grammar
from backends.tool_calls.families import FAMILIES
from backends.tool_calls.grammar import call_constraint, triggered_calls
from core.errors import ImpetusError
from core.types import Tool

KEYS = st.sampled_from(
    ("type", "properties", "required", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref",
     "$defs", "a", "b c", '"', "", "minimum", "multipleOf", "pattern", "additionalProperties")
)  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e300, 1e300) | st.sampled_from(
        ("string", "object", "array", "integer", "#/$defs/a", "a", '"', "<", "\n", "\u2028", "\\",
         "</parameter>", "")
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=14,
)  # fmt: skip
NAMES = st.sampled_from(
    ("f", "a-b", "a.b", '"', "\\", "\n", "<", "{", "😀", "f(", "%", "/x/", "'", "\0", "\u2028", " ")
)
TOOLS = st.lists(
    st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=4)), min_size=1, max_size=3
)


@pytest.mark.parametrize("family", FAMILIES)
def test_grammars_and_parsers_of_any_tools(family: str) -> None:
    @settings(
        max_examples=25,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(TOOLS, st.booleans(), st.sampled_from(('{"a":1}', '{"a":[{"b c":null}],"":""}', "{}")))
    def check(described: list[tuple[str, dict[str, Any]]], is_bare: bool, arguments: str) -> None:
        tools = [Tool(name, "", schema) for name, schema in described]
        form = FAMILIES[family]
        with suppress(ImpetusError):
            call_constraint(form, tools, is_bare=is_bare, allows_several=True)
        with suppress(ImpetusError):
            triggered_calls(form, tools)
        with suppress(ImpetusError):
            bare_call_grammar(form, tools)
        parser = form.parser(tools)
        for name, _ in described:
            parser.push(f'{form.tool_call_start}{{"name":"{name}","arguments":{arguments}}}')
        parser.flush()
        assert not parser.has_failed

    check()


def test_mismatches_are_bounded() -> None:
    parser = FAMILIES["hermes"].parser([Tool("f")])
    parser.push('<tool_call>{"name":"gone"}' * 5000)
    parser.flush()
    assert len(parser.mismatches) == 100
