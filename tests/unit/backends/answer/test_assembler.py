"""Tests of the text assembler: whole characters, stop strings, each token id in one event."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.answer.assembler import Detokenizer, StopMatcher, TextAssembler
from backends.answer.parser import OutputParser, Piece
from backends.answer.reasoning import ReasoningParser
from backends.stepper import StepOutput
from backends.tool_calls.families import FAMILIES
from core.types import (
    GenerationEvent,
    MismatchKind,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    Tool,
    ToolCallDelta,
)


class Tokens:
    """A vocabulary made up of the pieces of one text; a token's id is its place."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = list(pieces)

    def data(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def outputs(self, *, is_ended: bool = False) -> list[StepOutput]:
        last = len(self.pieces) - 1
        return [StepOutput(1, i, is_end=is_ended and i == last) for i in range(len(self.pieces))]


def run(
    pieces: Sequence[str | bytes],
    *,
    stop: Sequence[str] = (),
    max_tokens: int = 1000,
    parser: OutputParser | None = None,
    is_ended: bool = False,
) -> tuple[list[GenerationEvent], TextAssembler]:
    tokens = Tokens(p.encode() if isinstance(p, str) else p for p in pieces)
    assembler = TextAssembler(tokens.data, stop, max_tokens, parser)
    events = [e for output in tokens.outputs(is_ended=is_ended) for e in assembler.push(output)]
    return events, assembler


def text_of(events: Sequence[GenerationEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta))


def ids_of(events: Sequence[GenerationEvent]) -> list[int]:
    carriers = (TextDelta, ReasoningDelta, ToolCallDelta)
    return [i for e in events if isinstance(e, carriers) for i in e.token_ids]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(data=st.binary(max_size=40), places=st.lists(st.integers(0, 100), max_size=8))
def test_detokenizer_matches_decoding_at_once(data: bytes, places: list[int]) -> None:
    tokens = Tokens(cut(data, places))
    detokenizer = Detokenizer(tokens.data)
    pushed = [detokenizer.push(i) for i in range(len(tokens.pieces))]
    assert "".join(pushed) + detokenizer.flush() == data.decode("utf-8", "replace")


def test_detokenizer_split_character_is_withheld() -> None:
    tokens = Tokens([b"a\xf0\x9f", b"\x98", b"\x80b"])
    detokenizer = Detokenizer(tokens.data)
    assert [detokenizer.push(i) for i in range(3)] == ["a", "", "😀b"]


def test_detokenizer_invalid_byte_is_replaced_at_once() -> None:
    tokens = Tokens([b"\xff", b"\xe2\x82", b"x"])
    detokenizer = Detokenizer(tokens.data)
    assert [detokenizer.push(i) for i in range(3)] == ["\ufffd", "", "\ufffdx"]


def first_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the stop string that ends first, letter by letter."""
    for end in range(1, len(text) + 1):
        ends = [string for string in stop if text[:end].endswith(string)]
        if ends:
            return text[: end - max(map(len, ends))]
    return text


@given(
    text=st.text("ab", max_size=20),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    places=st.lists(st.integers(0, 100), max_size=8),
)
def test_stop_matcher_cuts_alike_however_split(
    text: str, stop: list[str], places: list[int]
) -> None:
    matcher = StopMatcher(stop)
    shown = "".join(matcher.push(part.decode()) for part in cut(text.encode(), places))
    assert shown + matcher.flush() == first_stop(text, stop)
    assert matcher.is_matched == any(string in text for string in stop)
    assert (matcher.matched in stop) == matcher.is_matched
    assert text.startswith(shown + matcher.matched)


def test_stop_matcher_holds_only_what_may_become_a_stop() -> None:
    matcher = StopMatcher(["\nUser:", "END"])
    assert [matcher.push(part) for part in ("a\nUs", "er", "s E", "N", "x")] == [
        "a",
        "",
        "\nUsers ",
        "",
        "ENx",
    ]


def test_assembler_plain_text_is_one_event_a_token() -> None:
    events, assembler = run(["Hel", "lo", "!"])
    assert events == [TextDelta("Hel", (0,)), TextDelta("lo", (1,)), TextDelta("!", (2,))]
    assert assembler.reason is None


def test_assembler_prefill_gives_no_event() -> None:
    assembler = TextAssembler(lambda _: b"x", (), 5)
    assert assembler.push(StepOutput(1, None, prefilled=10)) == []


def test_assembler_stop_split_over_tokens_never_leaks() -> None:
    events, assembler = run(["one E", "N", "D two", "three"], stop=["END"])
    assert text_of(events) == "one "
    assert ids_of(events) == [0, 1, 2]
    assert assembler.reason == "stop"


def test_assembler_partial_stop_at_the_end_is_text() -> None:
    events, assembler = run(["one E", "N", ""], stop=["END"], is_ended=True)
    assert text_of(events) == "one EN"
    assert ids_of(events) == [0, 1, 2]
    assert assembler.reason == "stop"


def test_assembler_unfinished_character_at_the_end_is_replaced() -> None:
    events, assembler = run(["a", b"\xe2\x82"], max_tokens=2)
    assert text_of(events) == "a\ufffd"
    assert assembler.reason == "length"


def test_assembler_stop_that_an_unfinished_character_completes_ends_with_stop() -> None:
    events, assembler = run(["a", b"\xe2\x82"], stop=["\ufffd"], max_tokens=2)
    assert text_of(events) == "a"
    assert assembler.reason == "stop"


def test_assembler_end_token_has_no_text_and_its_id_is_carried() -> None:
    events, assembler = run(["a", "<end>"], is_ended=True)
    assert events == [TextDelta("a", (0,)), TextDelta("", (1,))]
    assert assembler.reason == "stop"


def test_assembler_max_tokens_ends_with_length() -> None:
    events, assembler = run(["a", "b", "c"], max_tokens=2)
    assert text_of(events) == "ab"
    assert assembler.reason == "length"


@pytest.mark.parametrize("reason", ["cancelled", "length"])
def test_assembler_finish_releases_what_was_held(reason: str) -> None:
    _, assembler = run(["a E"], stop=["END"])
    events = assembler.finish("cancelled" if reason == "cancelled" else "length")
    assert text_of(events) == "E"
    assert assembler.reason == reason
    assert assembler.finish("stop") == []


def test_assembler_logprobs_travel_with_their_text() -> None:
    tokens = Tokens([b"\xc3", b"\xa9", b"."])
    assembler = TextAssembler(tokens.data, (), 10)
    entries = [TokenLogprob(i, tokens.data(i), -0.5) for i in range(3)]
    events = [
        event for i in range(3) for event in assembler.push(StepOutput(1, i, logprob=entries[i]))
    ]
    assert events == [
        TextDelta("é", (0, 1), (entries[0], entries[1])),
        TextDelta(".", (2,), (entries[2],)),
    ]


class CapitalsAreThoughts:
    """A parser that holds one push back, to show which event carries which ids."""

    def __init__(self) -> None:
        self.held = ""
        self.is_done = False
        self.mismatches: tuple[MismatchKind, ...] = ()

    def push(self, text: str) -> list[Piece]:
        shown, self.held = self.held, text
        return self._pieces(shown)

    def flush(self) -> list[Piece]:
        return self._pieces(self.held)

    def _pieces(self, text: str) -> list[Piece]:
        if text == "call":
            self.is_done = True
            return [ToolCallDelta(0, "id", "f", "{}")]
        return [ReasoningDelta(text) if text.isupper() else TextDelta(text)] if text else []


def test_assembler_parser_pieces_carry_every_id_once() -> None:
    events, assembler = run(["A", "b", "C", ""], parser=CapitalsAreThoughts(), is_ended=True)
    assert [type(event) for event in events] == [ReasoningDelta, TextDelta, ReasoningDelta]
    assert ids_of(events) == [0, 1, 2, 3]
    assert assembler.reason == "stop"


def test_assembler_finished_call_ends_with_tool_calls() -> None:
    events, assembler = run(["call", "x", "y"], parser=CapitalsAreThoughts())
    assert [type(event) for event in events] == [ToolCallDelta, TextDelta]
    assert assembler.reason == "tool_calls"


@given(
    data=st.lists(
        st.sampled_from(["a", "ab", "é", b"\xc3", b"\xff", "", "E", "N", "D"]), max_size=12
    ),
    stop=st.sampled_from([(), ("END",), ("ab", "EE")]),
    max_tokens=st.integers(1, 12),
)
def test_assembler_carries_every_pushed_id_once(
    data: list[str | bytes], stop: tuple[str, ...], max_tokens: int
) -> None:
    events, assembler = run(data, stop=stop, max_tokens=max_tokens)
    ids = ids_of([*events, *assembler.finish("length")])
    assert ids == list(range(len(ids)))
    assert len(ids) == len(data) or len(ids) <= max_tokens


PARTS = [
    *("<think>", "hm ", "é</th", "ink>\n", "x <tool", "_call>", '{"name": "f", ', '"arguments": '),
    *('{"a": [1', ", 2]}}", "</tool_call>", " y", "EN", "D", b"\xc3", b"\xa9", b"\xf0\x9f", ""),
]


def parser_of(kind: str) -> OutputParser | None:
    tools = FAMILIES["hermes"].parser((Tool("f"),))
    if kind == "bare":
        return tools
    return ReasoningParser(tools, is_open=False) if kind == "all" else None


def without_call_ids(events: Sequence[GenerationEvent]) -> list[GenerationEvent]:
    return [
        replace(event, id="call") if isinstance(event, ToolCallDelta) and event.id else event
        for event in events
    ]


@given(
    data=st.one_of(
        st.lists(st.sampled_from(PARTS), max_size=16),
        # The parts in their order make a whole answer.
        st.lists(st.booleans(), min_size=len(PARTS), max_size=len(PARTS)).map(
            lambda kept: [part for part, is_kept in zip(PARTS, kept, strict=True) if is_kept]
        ),
        st.just(PARTS),
    ),
    stop=st.sampled_from([(), ("END",), ("é", " y")]),
    kind=st.sampled_from(["plain", "bare", "all"]),
    max_tokens=st.integers(1, 20),
)
def test_assembler_after_replay_goes_on_without_loss_or_repetition(
    data: list[str | bytes], stop: tuple[str, ...], kind: str, max_tokens: int
) -> None:
    whole, undisturbed = run(
        data, stop=stop, max_tokens=max_tokens, parser=parser_of(kind), is_ended=True
    )
    tokens = Tokens(part.encode() if isinstance(part, str) else part for part in data)
    outputs = tokens.outputs(is_ended=True)
    for died_after in range(len(data)):
        first = TextAssembler(tokens.data, stop, max_tokens, parser_of(kind))
        sent = [event for output in outputs[:died_after] for event in first.push(output)]
        second = TextAssembler(tokens.data, stop, max_tokens, parser_of(kind))
        if first.reason is not None:
            break
        known = ids_of(sent)
        second.replay(known)
        later = [event for output in outputs[len(known) :] for event in second.push(output)]
        assert without_call_ids([*sent, *later]) == without_call_ids(whole)
        assert second.reason == undisturbed.reason
        assert second.reasoning_tokens == undisturbed.reasoning_tokens
