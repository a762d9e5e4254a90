"""Tests of escaped slashes in JSON under a grammar, token by token."""

import json
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.grammar.compiler import GrammarCompiler, GrammarMask, GrammarText, output_constraint
from backends.grammar.slash_escapes import ends_in_escape, without_slash_escapes
from backends.grammar.vocabulary import Vocabulary
from core.types import ChoiceOutput, JsonOutput, RegexOutput

BYTES = [bytes([each]) for each in range(256)]
# As vocabularies of byte pairs have them: each with and without the backslash, and some not.
MERGED = [
    b"\\/", b"//", b"\\/\\/", b"</", b"<\\/", b"://", b":\\/\\/", b'"/', b'"\\/', b'"\\', b"\\\\",
    b"a\\", b"/a", b"/\\", b"\\/\\", b"\\\\/", b"\\n\\/", b"\\n/", b"x\\/y", b"x/y", b"z\\/y",
]  # fmt: skip
END = len(BYTES) + len(MERGED)
VOCABULARY = Vocabulary([*BYTES, *MERGED, b"<end>"], [END], [END])


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY, lambda _: None)


def json_mask(schema: dict[str, Any] | None = None) -> GrammarMask:
    return compiler().mask(output_constraint(JsonOutput(schema)))


def allowed(mask: GrammarMask) -> set[bytes]:
    logits = np.zeros(END + 1, np.float32)
    mask.apply(logits)
    return {VOCABULARY.tokens[int(each)] for each in np.flatnonzero(np.isfinite(logits))}


def accepts(mask: GrammarMask, text: bytes, seed: int = 0) -> bool:
    """Write `text` with random tokens of those that are allowed."""
    chance, at = random.Random(seed), 0
    while at < len(text):
        choices = allowed(mask)
        # Of a text that can only go on in one way, the library allows the longest token only.
        possible = [token for token in sorted(choices) if text.startswith(token, at)]
        if not possible:
            return False
        token = chance.choice(possible)
        mask.accept(VOCABULARY.tokens.index(token))
        at += len(token)
    return mask.is_finished and not mask.problem


TEXTS = st.text(st.sampled_from([*'/\\a"<>:\n{é', "\x01", "\U0001f600"]), max_size=12)


@given(text=TEXTS, seed=st.integers(0, 2**32))
@pytest.mark.parametrize(
    "schema",
    [
        None,
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        {"type": "object", "additionalProperties": {"type": "string", "maxLength": 20}},
    ],
    ids=str,
)
def test_slashes_are_written_either_way(schema: Any, text: str, seed: int) -> None:
    chance = random.Random(seed)
    written = json.dumps({"a": text}, ensure_ascii=chance.random() < 0.5)
    pieces = written.split("/")
    raw = pieces[0] + "".join(chance.choice(["/", "\\/"]) + piece for piece in pieces[1:])
    assert json.loads(raw) == {"a": text}
    assert accepts(json_mask(schema), raw.encode(), seed)


@pytest.mark.parametrize(
    ("start", "token", "rest"),
    [
        (b'{"a": ', b'"\\/', b'"}'),
        (b'{"a": "', b"\\/", b'"}'),
        (b'{"a": "x', b"\\/\\/", b'"}'),
        (b'{"a": "', b"<\\/", b'"}'),
        (b'{"a": "', b":\\/\\/", b'"}'),
        (b'{"a": "', b"x\\/y", b'"}'),
        (b'{"a": "', b"\\n\\/", b'"}'),
        (b'{"a": "', b"a\\", b'/"}'),
        (b'{"a": "\\', b"/a", b'"}'),
        (b'{"a": "\\', b"/\\", b'/"}'),
        (b'{"a": "\\', b"\\\\", b'/"}'),
    ],
)
def test_tokens_with_escaped_slashes_are_allowed(start: bytes, token: bytes, rest: bytes) -> None:
    mask = json_mask()
    for each in start:
        mask.accept(each)
    assert token in allowed(mask)
    mask.accept(VOCABULARY.tokens.index(token))
    for each in rest:
        assert bytes([each]) in allowed(mask)
        mask.accept(each)
    assert mask.is_finished


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (b"\\/", b"/"),
        (b"\\\\/", b"\\\\/"),
        (b"\\\\\\/", b"\\\\/"),
        (b"\\/\\/\\n\\", b"//\\n\\"),
        (b"none", b"none"),
    ],
)
def test_only_escapes_of_slashes_are_undone(data: bytes, plain: bytes) -> None:
    assert without_slash_escapes(data) == plain


def test_the_end_of_text_is_in_an_escape_or_not() -> None:
    assert [ends_in_escape(each) for each in (b"", b"a", b"\\", b"\\\\", b"a\\\\\\")] == [
        False, False, True, False, True
    ]  # fmt: skip


def test_nothing_but_a_strings_text_has_escaped_slashes() -> None:
    properties = {"a": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    mask = json_mask(schema)
    for step in (b"{", b'"', b"a"):
        assert not [each for each in allowed(mask) if b"\\/" in each]
        mask.accept(VOCABULARY.tokens.index(step))


@pytest.mark.parametrize("value", ["/a", "a/b"])
def test_a_fixed_text_begins_no_escape(value: str) -> None:
    mask = json_mask({"const": {"x": value}})
    assert accepts(mask, json.dumps({"x": value}).encode())
    mask = json_mask({"const": {"x": value}})
    assert not accepts(mask, json.dumps({"x": value}).replace("/", "\\/").encode())


def test_a_fixed_text_with_another_escape_is_the_same_text() -> None:
    schema = {"enum": [{"x": "\\a"}, {"x": "/a"}]}
    assert accepts(json_mask(schema), rb'{"x": "\/a"}', 3)
    assert accepts(json_mask(schema), rb'{"x": "\\a"}', 3)
    assert not accepts(json_mask(schema), rb'{"x": "\/b"}', 3)


@pytest.mark.parametrize("output", [RegexOutput(r"[a/\\]*b", "r"), ChoiceOutput(("/a",), "c")])
def test_other_formats_are_bound_as_they_are(output: Any) -> None:
    mask = compiler().mask(output_constraint(output))
    mask._sequence._escapes = None
    plain = allowed(mask)
    again = compiler().mask(output_constraint(output))
    assert again._sequence._escapes is None
    assert allowed(again) == plain


@pytest.mark.parametrize(
    ("begun", "rest"),
    [
        (b'{"a": "\\/', b'b"}'),
        (b'{"a": "x\\', b'/b\\/"}'),
        (b'{"a": "x\\', b'n"}'),
        (b'{"a": "\\\\', b'/"}'),
        (b'{"a": "\\/\\', b'/"}'),
    ],
)
def test_a_begun_text_may_have_escaped_slashes(begun: bytes, rest: bytes) -> None:
    mask = json_mask()
    assert mask.restart(begun)
    for seed in range(5):
        assert mask.restart(begun)
        assert accepts(mask, rest, seed)
    assert not mask.restart(b"\\/")


def test_a_call_after_text_may_have_them() -> None:
    text = GrammarText(is_lenient=True)
    text_rule = text.json({"type": "object"})
    constraint = text.constraint(f'{text_rule} "</tool_call>"', "tools")
    mask = compiler().mask(constraint)
    assert accepts(mask, rb'{"path": "\/a<\/b>"}</tool_call>')
    mask = compiler().mask(constraint)
    assert not accepts(mask, rb'{"path": "a"}<\/tool_call>')
