"""Arbitrary and hostile text through every tool-call family: nothing raises, splits do not matter.

Examples are derandomized, so a run finds what the last one found.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.answer.parser import Piece
from backends.tool_calls.families import FAMILIES
from backends.tool_calls.json_values import compact, parse_json
from backends.tool_calls.parser import CallParser
from backends.tool_calls.python_literals import python_calls
from backends.tool_calls.schemas import argument_checker, from_text, types_of
from core.text import well_formed
from core.types import ReasoningDelta, TextDelta, Tool, ToolCallDelta
from tests.tool_forms import Answer, written

TOOLS = (
    Tool("f"),
    Tool("edit", "", {
        "type": "object",
        "properties": {
            "text": {"type": "string"}, "count": {"type": "integer"}, "any": {},
            "many": {"type": "array"},
        },
    }),
)  # fmt: skip
ARGUMENTS = {"text": 'a"b\n', "count": 3, "any": {"x": [1, None]}, "many": ["<", "}"]}

FRAGMENTS = (
    *'{}[](),:=<>"\'\\/-`.\n\t\0', " ", "  \n", "\u2028", "\ufeff", "\ud800", "\udc00", "😀", "é",
    '{"name":"f","arguments":{', '{"name": "edit", "parameters": "{', '"name":', '"arguments":',
    '"gone"', "gone", "f", "edit", "f(", "[f(", "a=", "text=", "call:f{", "call:edit{", "text:",
    "functions.f:0", "function", "```json\n", "```", " to=functions.f", "to=f", "analysis", "final",
    "<function=f>", "<function=edit>", "</function>", "<parameter=text>", "<parameter=any>",
    "</parameter>", '<invoke name="f">', '<parameter name="any">', "</invoke>", "<arg_key>",
    "any</arg_key>", "<arg_value>", "</arg_value>", "<longcat_arg_key>", "</longcat_arg_key>",
    "<longcat_arg_value>", "</longcat_arg_value>", "1", "-1", "1e999999", "-1e400", "9" * 5000,
    "0x1F", "0.5", "NaN", "Infinity", "-Infinity", "true", "None", "null", "\\ud800", "\\udc00",
    "\\ud83d\\ude00", '"{\\"a\\":\\"\\\\ud800\\"}"', "\\u00", "\\x", "\\N{DIGIT ONE}", "'''", '"""',
    "[[[[", "}}}}", '{"a":' * 250, "[" * 250, "(" * 150, "a." * 600, '"a":1,"a":2', "x" * 1100,
)  # fmt: skip

quickly = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def texts_of(family: str) -> st.SearchStrategy[str]:
    """Return texts that come near the family's form: its markers, their beginnings, its calls."""
    markers = FAMILIES[family].markers
    beginnings = tuple(marker[:length] for marker in markers for length in (1, len(marker) - 1))
    answers: list[list[tuple[str, dict[str, Any]]]] = [
        [("f", {})], [("edit", ARGUMENTS)], [("f", {"a": 1}), ("gone", {})]
    ]  # fmt: skip
    calls = tuple(written(family, Answer(answer)) for answer in answers)
    halves = [part for call in calls for part in (call[: len(call) // 2], call[len(call) // 2 :])]
    biased = st.sampled_from((*markers * 4, *beginnings, *calls * 3, *halves, *FRAGMENTS))
    return st.lists(biased | st.text(max_size=5), max_size=12).map("".join)


def cut(text: str, lengths: Sequence[int]) -> list[str]:
    """Return `text` in pieces of `lengths`, again and again."""
    chunks, at, number = [], 0, 0
    while at < len(text):
        length = lengths[number % len(lengths)]
        chunks.append(text[at : at + length])
        at, number = at + length, number + 1
    return chunks


def parse(parser: CallParser, chunks: Iterable[str]) -> tuple[list[tuple[str, str]], bool]:
    """Return what the pieces amount to, in order, and whether the parser wants no more."""
    pieces: list[Piece] = []
    for chunk in chunks:
        pieces += parser.push(chunk)
        if parser.is_done:
            break
    pieces += parser.flush()
    assert not parser.has_failed
    merged: list[tuple[str, str]] = []
    for piece in pieces:
        match piece:
            case TextDelta(text):
                kind = "text"
            case ReasoningDelta(text):
                kind = "reasoning"
            case ToolCallDelta():
                kind, text = f"call {piece.index}", piece.arguments
                if piece.name is not None:
                    merged.append((f"name {piece.index}", piece.name))
                    assert piece.id
        if text and merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1] + text)
        elif text:
            merged.append((kind, text))
    return [*merged, *(("mismatch", kind) for kind in parser.mismatches)], parser.is_done


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_in_any_split_gives_the_same(family: str) -> None:
    @quickly
    @given(texts_of(family), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
    def check(text: str, lengths: list[int], is_parallel: bool) -> None:
        def parsed(chunks: Iterable[str]) -> tuple[list[tuple[str, str]], bool]:
            return parse(FAMILIES[family].parser(TOOLS, is_parallel=is_parallel), chunks)

        whole = parsed([text])
        assert parsed(cut(text, lengths)) == whole
        if len(text) < 2000:
            assert parsed(text) == whole

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_is_no_call_is_not_lost(family: str) -> None:
    @quickly
    @given(texts_of(family), st.lists(st.integers(1, 9), min_size=1, max_size=5))
    def check(text: str, lengths: list[int]) -> None:
        result, _ = parse(FAMILIES[family].parser(()), cut(text, lengths))
        shown = "".join(value for kind, value in result if kind in ("text", "reasoning"))
        if family == "harmony":
            # Its headers and markers frame all text; they are not part of it.
            return
        for marker in FAMILIES[family].markers:
            text, shown = text.replace(marker, ""), shown.replace(marker, "")
        assert sorted(shown.replace("[]", "").split()) == sorted(text.replace("[]", "").split())

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_without_markers_is_kept_exactly(family: str) -> None:
    @quickly
    @given(
        st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=8).map("".join),
        st.lists(st.integers(1, 9), min_size=1, max_size=5),
    )
    def check(text: str, lengths: list[int]) -> None:
        for marker in FAMILIES[family].markers:
            text = text.replace(marker, "")
        for chunks in ([text], cut(text, lengths)):
            parser = FAMILIES[family].parser(())
            result, _ = parse(parser, chunks)
            assert result == ([("text", text)] if text else [])

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_finished_calls_have_valid_json(family: str) -> None:
    @quickly
    @given(texts_of(family))
    def check(text: str) -> None:
        for raw in (text, written(family, Answer([("edit", {"text": text, "any": text})]))):
            result, _ = parse(FAMILIES[family].parser(TOOLS), [raw])
            if ("mismatch", "malformed") in result:
                continue
            # The last call may be unfinished.
            for value in [value for kind, value in result if kind.startswith("call")][:-1]:
                assert isinstance(parse_json(value), dict)
                assert value == well_formed(value) or "\ud800" in text or "\udc00" in text

    check()


# A million characters each: what takes quadratic time on them takes many minutes.
SIZE = 1_000_000
LONG = {
    "spaces": ("hermes", " "),
    "lines after a call": ("longcat", "\n"),
    "markers": ("granite", "<|tool_call|>"),
    "two markers": ("qwen3_coder", "<tool_call>"),
    "beginnings": ("kimi_k2", "<|tool_calls_section_begin|"),
    "sections": ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>f"),
    "brackets": ("mistral", "[TOOL_CALLS]["),
    "braces": ("hermes", '<tool_call>{"name":'),
    "attributes": ("pythonic", "[f(a."),
    "python lists": ("lfm2", "<|tool_call_start|>[f(a=[("),
    "escapes": ("phi4_mini", '<|tool_call|>{"name":"f","arguments":{"\\n\\ud800'),
    "broken calls": ("cohere", '<|START_ACTION|>{"name":"f","arguments":{"a":1x'),
    "calls": ("llama3_json", '<|python_tag|>{"name":"f","arguments":{"a":1}}; '),
    "gemma": ("gemma4", "<|tool_call>call:f{a:"),
    "channels": ("harmony", "<|channel|>commentary to=f<|message|>{"),
    "headers": ("harmony", "<|channel|>"),
    "functions": ("qwen3_coder", "<function=edit><parameter="),
    "values": ("qwen3_coder", "<function=edit><parameter=any>"),
    "keys": ("glm4", "<tool_call>edit<arg_key>any</arg_key>"),
    "names": ("minimax_m2", '<minimax:tool_call><invoke name="'),
    "words": ("phi4", "functoolsf"),
    "fences": ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f"),
}


@pytest.mark.parametrize(("family", "unit"), LONG.values(), ids=LONG)
def test_long_hostile_text_takes_linear_time(family: str, unit: str) -> None:
    text = unit * (SIZE // len(unit))
    parsers = [FAMILIES[family].parser(TOOLS) for _ in range(3)]
    assert parse(parsers[0], [text])[0]
    short = text[: SIZE // 16]
    assert parse(parsers[1], cut(short, (5, 11))) == parse(parsers[2], [short])


def test_a_long_string_arrives_in_linear_time() -> None:
    for opening in ('<tool_call>{"name":"f","arguments":{"', '<tool_call>{"arguments":"', '{"'):
        text = opening + "\\n" * (SIZE // 2)
        assert parse(FAMILIES["hermes"].parser(TOOLS), [text])[0]
        assert parse(FAMILIES["hermes"].parser(TOOLS), cut(text[: SIZE // 16], (8,)))[0]


def test_values_have_limits() -> None:
    assert parse_json("[" * 200 + "]" * 200)
    assert parse_json('"' + "[" * 100_000 + '"') == "[" * 100_000
    for text in ("[" * 201 + "]" * 201, "[" * 10**6, '{"a":' * 10**5, "NaN", "1e999", "9" * 10**5):
        with pytest.raises(ValueError, match=r"nested|NaN|finite|digits"):
            parse_json(text)
        assert from_text(text, frozenset()) == text
    assert compact({"a": "\ud83d\ude00\ud83d"}) == '{"a":"😀\ufffd"}'
    with pytest.raises(ValueError, match="JSON compliant"):
        compact([float("inf")])


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("a=1, b=-2.5, c=0x1F, d=1_000, e=.5e1", {"a": 1, "b": -2.5, "c": 31, "d": 1000, "e": 5.0}),
        ("a=True, b=false, c=None, d=null", {"a": True, "b": False, "c": None, "d": None}),
        ("a='x' \"y\", b=r'\\n', c='''l\n'm'''", {"a": "xy", "b": "\\n", "c": "l\n'm"}),
        ("a='\\x41\\u00e9\\101\\N{DIGIT ONE}\\q\\\n'", {"a": "AéA1\\q"}),
        ("a=[1, (2,), (3), (), {'k': {}}],  # note\n", {"a": [1, [2], 3, [], {"k": {}}]}),
        ("a=" + "[" * 100 + "]" * 100, {"a": json.loads("[" * 100 + "]" * 100)}),
    ],
)  # fmt: skip
def test_python_literals_are_read(arguments: str, value: object) -> None:
    assert python_calls(f"[f({arguments}), g.h()]") == [("f", value), ("g.h", {})]


@pytest.mark.parametrize(
    "arguments",
    ["a=" + "[" * 101 + "]" * 101, "a=" + "-" * 9999 + "1", "a=lambda: 1", "a=1, a=2", "1", "**a",
     "a={1}", "a={1: 2}", "a=b''", "a=f''", "a='\\x4'", "a='\\N{NOTHING}'", "a='", "a=1j", "a=01",
     "a=" + "9" * 10**5, "a=[,]", "a=1 2", "a=" + "x." * 10**5 + "x", "a"],
)  # fmt: skip
def test_other_python_is_no_call(arguments: str) -> None:
    parser = FAMILIES["pythonic"].parser(TOOLS)
    text = f"[f({arguments})]"
    assert parse(parser, [text]) == ([("text", text)], False)


def test_a_schema_that_explodes_is_not_followed() -> None:
    wide: Any = {"anyOf": [{"$ref": "#/$defs/a"}] * 100}
    root: Any = {"$defs": {"a": wide}}
    assert types_of(wide, root) == frozenset()
    strict: Any = {"anyOf": [{"$ref": "#/$defs/a"}] * 100, "type": "array"}
    fits = argument_checker(
        [
            Tool("wide", "", {"properties": {"x": strict}, "$defs": {"a": strict}}),
            Tool("unique", "", {"properties": {"x": {"uniqueItems": True}}}),
            Tool("zero", "", {"properties": {"x": {"multipleOf": 0}}}),
            Tool("named", "", {"$id": 5, "properties": {"x": {"$ref": 7}}}),
            Tool("re", "", {"patternProperties": {"(a|a)*$": {}}, "additionalProperties": False}),
            Tool("plain", "", {"properties": {"x": {"type": "string"}}}),
        ]
    )  # fmt: skip
    many = json.dumps({"x": [{"i": index} for index in range(50_000)]})
    assert fits("wide", '{"x":1}')
    assert fits("unique", many)
    assert fits("zero", '{"x":1}')
    assert fits("named", '{"x":1}')
    assert fits("re", json.dumps({"a" * 60 + "b": 1}))
    assert not fits("plain", '{"x":1}')
    assert not fits("plain", "[" * 10**5)
    assert fits("plain", json.dumps({"x": "y" * 10**6}))
