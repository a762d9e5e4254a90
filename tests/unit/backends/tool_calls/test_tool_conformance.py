"""Conformance tests: the calls of each family's template are parsed, however split."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.answer.parser import OutputParser, Piece
from backends.answer.reasoning import ReasoningParser
from backends.tool_calls.families import FAMILIES, family_of
from core.types import ReasoningDelta, TextDelta, ToolCallDelta
from tests.tool_forms import TEMPLATES, TOOLS, Answer, written

Read = tuple[str, str, list[tuple[str, Any]]]

NESTED = {"options": {"a": [1, {"b": [], "c": {"d": None}}], "e": -2.5}, "lines": [[], [{}], "x"]}
UNICODE = {"path": "日本/ñandú 🦉.txt", "text": "e\u0301 \u2028 \u202eabc", "lines": ["ß", "🇨🇭"]}
QUOTES = {"text": "say \"hi\" and 'ho' \\ `x` \\n {{}} [] ,:", "path": 'C:\\dir\\"q"'}
NEWLINES = {"text": "\nfirst\n\n\tsecond\r\n", "lines": ["a\nb", "\n"]}
SCALARS = {"count": 3, "ratio": 0.5, "is_final": True, "path": "3", "text": "true"}

CASES: Mapping[str, Answer] = {
    "one call": Answer([("edit_file", {"path": "a.txt", "count": 1})]),
    "nested JSON": Answer([("edit_file", NESTED)]),
    "unicode": Answer([("edit_file", UNICODE)]),
    "quotes": Answer([("edit_file", QUOTES)]),
    "newlines": Answer([("edit_file", NEWLINES)]),
    "types": Answer([("edit_file", SCALARS)]),
    "empty arguments": Answer([("list_files", {})]),
    "two calls": Answer([("edit_file", {"path": "a"}), ("list_files", {})]),
    "call after text": Answer([("edit_file", {"path": "a"})], text="I look. [x] <b> {y}"),
    "call after reasoning": Answer([("list_files", {})], reasoning="hm"),
    "no call": Answer([], text="Just [text], <b> and {braces} at 3 < 4."),
}


def parser_of(family: str) -> OutputParser:
    parser = FAMILIES[family].parser(TOOLS)
    return parser if family == "harmony" else ReasoningParser(parser, is_open=False)


def read(family: str, parts: Iterable[str]) -> Read:
    parser = parser_of(family)
    pieces: list[Piece] = [piece for part in parts for piece in parser.push(part)]
    return collected([*pieces, *parser.flush()])


def collected(pieces: Sequence[Piece]) -> Read:
    """Return text, reasoning and (name, arguments' text) calls, checking ids and order."""
    calls: list[tuple[str, str]] = []
    ids: list[str] = []
    for piece in pieces:
        if isinstance(piece, ToolCallDelta):
            if piece.name is not None:
                ids.append(piece.id or "")
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    assert all(ids)
    assert len(set(ids)) == len(ids)
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))
    thought = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta))
    return text, thought, calls


def cuts(text: str) -> Iterable[list[str]]:
    """Yield every cut of `text` in two, and even cuts into small pieces."""
    for size in (1, 2, 3, 7):
        yield [text[i : i + size] for i in range(0, len(text), size)]
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


def check(family: str, answer: Answer) -> None:
    raw = written(family, answer)
    text, thought, calls = read(family, [raw])
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        (name, dict(arguments)) for name, arguments in answer.calls
    ], raw
    assert text == answer.text
    assert thought == (answer.reasoning or "")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_read(family: str, case: str) -> None:
    check(family, CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_equals_the_whole(family: str, case: str) -> None:
    raw = written(family, CASES[case])
    whole = read(family, [raw])
    for parts in cuts(raw):
        assert read(family, parts) == whole, parts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_in_reasoning_stays_reasoning(family: str) -> None:
    inner = written("hermes" if family == "harmony" else family, CASES["one call"]).strip()
    answer = Answer([], text="Done.", reasoning=inner)
    check(family, answer)
    whole = read(family, [written(family, answer)])
    for parts in cuts(written(family, answer)):
        assert read(family, parts) == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_cut_off_stays_reasoning(family: str) -> None:
    raw = written(family, Answer([], reasoning="because of"))
    for end in range(raw.index("because") + 1, raw.index("because of") + len("because of")):
        text, thought, calls = read(family, list(raw[:end]))
        assert (text, calls) == ("", [])
        assert "because of".startswith(thought.strip())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_parallel_calls_the_first_ends_the_answer(family: str) -> None:
    parser = FAMILIES[family].parser(TOOLS, is_parallel=False)
    pieces = parser.push(written(family, CASES["two calls"])) + parser.flush()
    _, _, calls = collected(pieces)
    assert [name for name, _ in calls] == ["edit_file"]
    assert parser.is_done


@pytest.mark.parametrize("family", FAMILIES)
def test_i10_a_malformed_call_ends_as_text_or_unfinished(family: str) -> None:
    raw = written(family, CASES["nested JSON"])
    for at in range(1, len(raw), 3):
        broken = f"{raw[:at]}\x00}}]>{raw[at + 2 :]}"
        whole = read(family, [broken])
        assert read(family, list(broken)) == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_cut_off_never_wedges(family: str) -> None:
    raw = written(family, CASES["two calls"])
    for end in range(len(raw)):
        assert read(family, list(raw[:end])) == read(family, [raw[:end]])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_undeclared_function_is_counted_and_no_call(family: str) -> None:
    raw = written(family, Answer([("remove_all", {})]))
    parser = FAMILIES[family].parser(TOOLS)
    _, _, calls = collected(parser.push(raw) + parser.flush())
    assert calls == []
    if family not in ("pythonic", "lfm2"):
        assert list(parser.mismatches) == ["undeclared"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_tells_the_family(family: str) -> None:
    marks = {"harmony": "<|channel|>analysis<|message|>", "phi4": "functools["}
    assert family_of(TEMPLATES[family] + marks.get(family, "")).name == family


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "harmony"])
def test_a_whole_call_is_parsed_between_its_markers(family: str) -> None:
    form = FAMILIES[family]
    raw = written(family, CASES["one call"]).strip()
    inner = raw.removeprefix(form.tool_call_start).removesuffix(form.tool_call_end)
    _, _, calls = collected(form.parse_tool_call(inner, TOOLS))
    assert [(name, json.loads(text)) for name, text in calls] == [
        ("edit_file", {"path": "a.txt", "count": 1})
    ]


# Text that closes a form's own tags cannot be written in it, control characters in none.
WORDS = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028<>|`"), max_size=12
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | WORDS
    | st.floats(allow_nan=False, allow_infinity=False, width=32),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "path": WORDS,
        "text": WORDS,
        "count": st.integers(-(2**53), 2**53),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "is_final": st.booleans(),
        "lines": st.lists(VALUES, max_size=3),
        "options": st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), VALUES),
    },
)


@pytest.mark.parametrize("family", FAMILIES)
@given(arguments=ARGUMENTS, size=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_generated_arguments_keep_their_value(
    family: str, arguments: dict[str, Any], size: int
) -> None:
    answer = Answer([("edit_file", arguments)])
    check(family, answer)
    raw = written(family, answer)
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert read(family, parts) == read(family, [raw])
