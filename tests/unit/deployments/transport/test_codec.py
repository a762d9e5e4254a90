"""Frames: what goes in comes out, and broken ones are noticed."""

from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import EngineFailed
from core.types import (
    CacheOutcome,
    Finished,
    GenerationEvent,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    Timing,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from deployments.transport import codec
from deployments.transport.codec import (
    LENGTH_BYTES,
    decode_body,
    decode_length,
    encode_frame,
    encode_frames,
)

LOGPROB = TokenLogprob(1, b"\xf0\x9f", -0.5, (TokenLogprob(7, b"x", -1.0),))
EVENTS: list[GenerationEvent] = [
    PrefillProgress(512, 4096),
    TextDelta("grüße 🎈\u2028", (1, 2), (LOGPROB,)),
    ReasoningDelta("because", (3,)),
    ToolCallDelta(0, "call_1", "read", "", (4,)),
    ToolCallDelta(0, None, None, '{"path":', ()),
    Finished("tool_calls", Usage(10, 5, 4, 2), Timing(0.1, 0.2, 0.3, throttled_s=0.4)),
    Finished("stop", Usage(10, 5), stop="END"),
    Finished(
        "stop",
        Usage(10, 5, 4),
        cache=CacheOutcome(1, 1, 2, "diverged", 4, "day ", "Thursday", "Friday ü"),
    ),
]


def test_frame_round_trip_keeps_every_event() -> None:
    frame = encode_frame([("a", EVENTS), ("b", [TextDelta("x")])])
    assert decode_length(frame, 0) == len(frame) - LENGTH_BYTES
    assert decode_body(frame[LENGTH_BYTES:]) == [("a", EVENTS), ("b", [TextDelta("x")])]


def test_decode_length_refuses_absurd_frames() -> None:
    with pytest.raises(ValueError, match="4294967295"):
        decode_length(b"\xff\xff\xff\xff", 0)


NUMBERS = st.integers() | st.integers(-(2**80), 2**80)
TEXTS = st.text(st.characters()) | st.sampled_from(("", "\ud800", "\udfff😀\0\u2028"))
FLOATS = st.floats()
IDS = st.lists(NUMBERS, max_size=3).map(tuple)
LOGPROBS = st.recursive(
    st.builds(TokenLogprob, NUMBERS, st.binary(max_size=5), FLOATS),
    lambda inner: st.builds(
        TokenLogprob, NUMBERS, st.binary(max_size=5), FLOATS, st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=4,
)
ANY_EVENT: st.SearchStrategy[GenerationEvent] = st.one_of(
    st.builds(TextDelta, TEXTS, IDS, st.lists(LOGPROBS, max_size=3).map(tuple)),
    st.builds(ReasoningDelta, TEXTS, IDS),
    st.builds(ToolCallDelta, NUMBERS, st.none() | TEXTS, st.none() | TEXTS, TEXTS, IDS),
    st.builds(PrefillProgress, NUMBERS, NUMBERS),
    st.builds(
        Finished,
        st.sampled_from(("stop", "length", "tool_calls", "cancelled")),
        st.builds(Usage, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
        st.builds(Timing, FLOATS, FLOATS, FLOATS, throttled_s=FLOATS),
        st.none() | TEXTS,
        st.lists(st.sampled_from(("schema", "malformed", "undeclared"))).map(tuple),
        st.none() | st.builds(CacheOutcome, NUMBERS, miss=st.none() | st.just("evicted")),
    ),
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(TEXTS, st.lists(ANY_EVENT, max_size=4)), max_size=4))
def test_any_event_survives_the_round_trip(batch: list[tuple[str, list[GenerationEvent]]]) -> None:
    (frame,) = encode_frames(batch)
    assert frame == encode_frame(batch)
    assert decode_length(frame, 0) == len(frame) - LENGTH_BYTES
    # NaN is not equal to itself.
    assert repr(decode_body(frame[LENGTH_BYTES:])) == repr(batch)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_garbage_is_refused_as_a_value_error(data: bytes, place: int, value: int) -> None:
    frame = bytearray(encode_frame([("a", EVENTS)])[LENGTH_BYTES:])
    frame[place] = value
    for body in (data, bytes(frame), bytes(frame[:place])):
        # Any other exception fails the test.
        with suppress(ValueError):
            for request_id, arrival in decode_body(body):
                assert isinstance(request_id, str)
                assert isinstance(arrival, list | EngineFailed)


@pytest.mark.parametrize("bad", [object(), TextDelta(object()), TextDelta("x", (object(),))])  # type: ignore[arg-type]
def test_an_event_that_cannot_be_encoded_is_lost_for_its_request_only(bad: Any) -> None:
    frames = encode_frames(
        [("a", [EVENTS[1]]), ("b", [EVENTS[1], bad, EVENTS[2]]), ("c", [EVENTS[0], EVENTS[2]])]
    )
    arrivals = [one for frame in frames for one in decode_body(frame[LENGTH_BYTES:])]
    assert [one for one in arrivals if one[0] != "b"] == [
        ("a", [EVENTS[1]]), ("c", [EVENTS[0]]), ("c", [EVENTS[2]])
    ]  # fmt: skip
    (_, kept), (_, lost) = [one for one in arrivals if one[0] == "b"]
    assert kept == [EVENTS[1]]
    assert isinstance(lost, EngineFailed)
    assert "send the request again" in lost.message


def test_an_event_that_cannot_be_decoded_is_lost_for_its_request_only() -> None:
    body = msgpack.packb(
        [("a", [(0, "x", (), ())]), ("b", [(0, "x")]), ("c", 5), ("d", [(9,), None]), ("e", [])]
    )
    kinds = {name: type(arrival) for name, arrival in decode_body(body)}
    assert kinds == {"a": list, "b": EngineFailed, "c": EngineFailed, "d": EngineFailed, "e": list}


def test_a_frame_over_the_maximum_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 1000)
    half, large = TextDelta("x" * 600), TextDelta("y" * 1001)
    frames = encode_frames([("a", [half, half]), ("b", [half, large, half]), ("c", [half])])
    arrivals = [one for frame in frames for one in decode_body(frame[LENGTH_BYTES:])]
    assert [name for name, _ in arrivals] == ["a", "a", "b", "b", "c"]
    assert [arrival for name, arrival in arrivals if name != "b"] == [[half]] * 3
    assert isinstance(arrivals[3][1], EngineFailed)


def test_numbers_of_numpy_are_encoded() -> None:
    frame = encode_frame([("a", [TextDelta("x", (np.int64(5),))])])  # type: ignore[arg-type]
    assert decode_body(frame[LENGTH_BYTES:]) == [("a", [TextDelta("x", (5,))])]
