"""Frames: what goes in comes out, and broken ones are noticed."""

import pytest

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
from deployments.transport.codec import LENGTH_BYTES, decode_body, decode_length, encode_frame

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


def test_decode_body_refuses_unknown_events() -> None:
    frame = encode_frame([("a", [TextDelta("x")])])
    body = frame[LENGTH_BYTES:].replace(b"\x94\x00", b"\x94\x09")
    with pytest.raises(ValueError, match="unknown event"):
        decode_body(body)
