"""Arbitrary bytes in arbitrary tokens: nothing raises, and how they are split does not matter."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.answer.assembler import TextAssembler
from backends.answer.mask import AnswerMask, ReasoningPlan
from backends.answer.parser import OutputParser
from backends.answer.reasoning import _KNOWN, THINK, ReasoningParser, ReasoningTags
from backends.stepper import StepOutput
from backends.tool_calls.families import FAMILIES
from core.types import ReasoningDelta, TextDelta, Tool, ToolCallDelta

TOOLS = (Tool("f"),)
PIECES = (
    b" ", b"\n", b"\t \n", b"a", b"</", b"<", b"think", b">", b"\xf0\x9f", b"\x98\x80", b"\xff",
    b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x00", b"STOP", b"ST", b"OP", b"\xc3", b"\xa9", b"f",
    b"x" * 50,
    b'<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', b'{"name":"f"}', b"[f(a=1)]",
    "😀".encode(), "\U0010ffff".encode(), b"\xf4\x90\x80\x80", b"\xc0\x80",
)  # fmt: skip


def bytes_of(tags: ReasoningTags) -> st.SearchStrategy[bytes]:
    marks = tuple(mark.encode() for mark in (tags.open, tags.close, tags.close[:-1], tags.open[:2]))
    pieces = st.sampled_from((*PIECES, *marks * 4)) | st.binary(max_size=4)
    return st.lists(pieces, max_size=14).map(b"".join)


def answer(
    tokens: Sequence[bytes], parser: OutputParser | None, stop: Sequence[str], limit: int
) -> dict[str, Any]:
    """Return what an answer's events amount to; checks that each token is in exactly one."""
    assembler = TextAssembler(lambda token_id: tokens[token_id], stop, limit, parser)
    events = []
    used = 0
    for token_id in range(len(tokens)):
        events += assembler.push(StepOutput(0, token_id))
        used += 1
        if assembler.reason is not None:
            break
    events += assembler.finish("stop")
    ids = [token_id for event in events for token_id in getattr(event, "token_ids", ())]
    assert ids == list(range(used))
    result: dict[str, Any] = {
        "text": "".join(event.text for event in events if isinstance(event, TextDelta)),
        "reasoning": "".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        "calls": [
            (event.index, event.name) for event in events
            if isinstance(event, ToolCallDelta) and event.name
        ],
        "arguments": "".join(
            event.arguments for event in events if isinstance(event, ToolCallDelta)
        ),
        "mismatches": assembler.mismatches,
        "stop": assembler.matched_stop,
        "reason": assembler.reason,
    }  # fmt: skip
    for name in ("text", "reasoning", "arguments"):
        result[name].encode()
    return result


def cut(data: bytes, lengths: Sequence[int]) -> list[bytes]:
    tokens, at, number = [], 0, 0
    while at < len(data):
        length = lengths[number % len(lengths)]
        tokens.append(data[at : at + length])
        at, number = at + length, number + 1
    return tokens


@pytest.mark.parametrize("family", [None, "hermes", "pythonic", "harmony", "qwen3_coder"])
@pytest.mark.parametrize("tags", _KNOWN, ids=lambda tags: tags.open)
def test_any_split_of_any_bytes_gives_the_same_answer(
    family: str | None, tags: ReasoningTags
) -> None:
    @settings(
        max_examples=25,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        bytes_of(tags),
        st.lists(st.integers(1, 7), min_size=1, max_size=4),
        st.sampled_from(((), ("STOP",), ("OP", "STOP ", "\n\n"), (tags.close, "x" * 40))),
        st.booleans(),
        st.booleans(),
    )
    def check(
        data: bytes, lengths: list[int], stop: Sequence[str], is_open: bool, is_parallel: bool
    ) -> None:
        def parsed(tokens: Sequence[bytes]) -> dict[str, Any]:
            inner = FAMILIES[family].parser(TOOLS, is_parallel=is_parallel) if family else None
            parser = ReasoningParser(inner, is_open=is_open, tags=tags)
            return answer(tokens, parser, stop, 10**6)

        whole = parsed([data])
        assert parsed(cut(data, lengths)) == whole
        assert parsed(cut(data, (1,))) == whole

    check()


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    bytes_of(THINK),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.sampled_from(((), ("STOP",), ("OP", "STOP ", "\n"), ("\ufffd", "😀"))),
)
def test_plain_text_is_whole_up_to_the_stop(
    data: bytes, lengths: list[int], stop: Sequence[str]
) -> None:
    text = data.decode("utf-8", "replace")
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    expected = text[: min(ends)[1]] if ends else text
    for tokens in ([data], cut(data, lengths), cut(data, (1,))):
        assert answer(tokens, None, stop, 10**6)["text"] == expected


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(bytes_of(THINK), st.integers(0, 20), st.integers(0, 20))
def test_an_answer_ends_at_its_limit_or_outside_reason(
    data: bytes, limit: int, cut_at: int
) -> None:
    parser = ReasoningParser(FAMILIES["hermes"].parser(TOOLS), is_open=True)
    tokens = cut(data, (1,))[:cut_at]
    result = answer(tokens if limit else [], parser, ("STOP",), limit)
    assert result["reason"] in ("stop", "length", "tool_calls")


@pytest.mark.parametrize(
    "unit", [" ", "\n", "<", "</thin", "x ", "<think></think>", "<think> </think>\n"]
)
def test_long_reasoning_takes_linear_time(unit: str) -> None:
    for is_open in (True, False):
        for inner in (None, FAMILIES["hermes"].parser(TOOLS)):
            parser = ReasoningParser(inner, is_open=is_open)
            # As many pieces as characters: what copies all that it holds takes hours.
            count = 200_000 // len(unit)
            pieces = [piece for _ in range(count) for piece in parser.push(unit)]
            pieces += parser.flush()
            shown = "".join(
                piece.text for piece in pieces if isinstance(piece, TextDelta | ReasoningDelta)
            )
            assert len(shown) <= count * len(unit)


class Letters:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        del add_bos, parse_special
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((token_id,))


def test_a_mask_waits_for_reasoning_in_linear_time() -> None:
    plan = ReasoningPlan(THINK, is_open=False, budget=1)
    mask = AnswerMask(Letters(), reasoning=plan)  # type: ignore[arg-type]
    for _ in range(500_000):
        mask.accept(ord(" "))
    for letter in b"<think>x":
        assert not mask.is_active
        mask.accept(letter)
    assert mask.is_active
