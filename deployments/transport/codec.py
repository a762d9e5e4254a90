"""Encodes generation events as msgpack frames, one frame per engine step."""

import logging
import struct
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, TypeAlias

import msgpack
import numpy as np

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

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
LENGTH_BYTES = _LENGTH.size
# A larger frame can only be a bug of the sender, which splits what is larger.
MAX_FRAME_BYTES = 64 * 1024 * 1024

_TEXT, _REASONING, _TOOL_CALL, _PREFILL, _FINISHED, _LOST = range(6)
_BIG_INTEGER = 1

StepEvents = Sequence[tuple[str, Sequence[GenerationEvent]]]
# What arrived for one request: events, or why the next ones are lost.
Arrival: TypeAlias = "list[GenerationEvent] | EngineFailed"


def encode_frame(batch: StepEvents) -> bytes:
    """Return one frame: a little-endian uint32 length, then msgpack.

    Raises an exception of any kind for events that cannot be encoded, or exceed the maximum.
    """
    return _framed([(request_id, list(map(_pack, events))) for request_id, events in batch])


def encode_frames(batch: StepEvents) -> list[bytes]:
    """Return the frames of a step, one as a rule; never raises.

    A request whose events cannot be encoded gets an error in their place.  A frame over the maximum
    is split.
    """
    try:
        return [encode_frame(batch)]
    except Exception:
        return [frame for request_id, events in batch for frame in _frames_of(request_id, events)]


def lost_frame(request_id: str) -> bytes:
    """Return a frame that ends a request with an error: its next events are lost."""
    return _framed([(request_id, [(_LOST,)])])


def decode_length(data: bytes | bytearray, offset: int) -> int:
    """Return the body length of the frame at `offset`.  Raises ValueError over the maximum."""
    length: int = _LENGTH.unpack_from(data, offset)[0]
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
    return length


def decode_body(body: bytes | bytearray | memoryview) -> list[tuple[str, Arrival]]:
    """Return what a frame's body has for each request id; see `Arrival`.

    Events that cannot be decoded are lost for their request only.  Raises ValueError if the body as
    a whole cannot be decoded.
    """
    arrivals: list[tuple[str, Arrival]] = []
    try:
        for request_id, events in _unpacked(body):
            if not isinstance(request_id, str):
                raise ValueError("a request id is not text")
            try:
                arrivals.append((request_id, [_unpack(event) for event in events]))
            except Exception as problem:
                arrivals.append((request_id, _lost(request_id, problem)))
    except Exception as problem:
        raise ValueError(f"a frame cannot be decoded: {problem}") from problem
    return arrivals


def _lost(request_id: str, problem: Exception) -> EngineFailed:
    if not isinstance(problem, _SenderLost):
        logger.error("events of %s cannot be decoded", request_id, exc_info=problem)
    return EngineFailed(
        "A part of the answer was lost between the engine and the router; send the request again."
    )


class _SenderLost(Exception):
    """The sender could not encode the events."""


def _frames_of(request_id: str, events: Sequence[GenerationEvent]) -> list[bytes]:
    """Return one frame for each event of a request, up to one that cannot be encoded."""
    frames: list[bytes] = []
    for event in events:
        try:
            frames.append(encode_frame([(request_id, [event])]))
        except Exception:
            logger.exception("an event of %s cannot be encoded", request_id)
            frames.append(lost_frame(request_id))
            break
    return frames


def _framed(requests: list[tuple[str, list[tuple[Any, ...]]]]) -> bytes:
    try:
        body: bytes = msgpack.packb(requests, default=_pack_other)
    except UnicodeEncodeError:
        # Only texts with lone surrogates, which UTF-8 cannot represent, get here.
        body = msgpack.packb(requests, default=_pack_other, unicode_errors="surrogatepass")
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def _unpacked(body: bytes | bytearray | memoryview) -> Any:
    try:
        return msgpack.unpackb(body, ext_hook=_unpack_other)
    except UnicodeDecodeError:
        return msgpack.unpackb(body, ext_hook=_unpack_other, unicode_errors="surrogatepass")


def _pack_other(value: object) -> Any:
    """Return what stands for a value that msgpack does not know.  Raises TypeError."""
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return msgpack.ExtType(_BIG_INTEGER, value.to_bytes(size, "little", signed=True))
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot encode a {type(value).__name__}")


def _unpack_other(code: int, data: bytes) -> int:
    if code != _BIG_INTEGER:
        raise ValueError(f"unknown extension {code}")
    return int.from_bytes(data, "little", signed=True)


def _pack(event: GenerationEvent) -> tuple[Any, ...]:
    match event:
        case TextDelta():
            return (_TEXT, event.text, event.token_ids, _pack_logprobs(event.logprobs))
        case ReasoningDelta():
            return (_REASONING, event.text, event.token_ids)
        case ToolCallDelta():
            return (_TOOL_CALL, event.index, event.id, event.name, event.arguments, event.token_ids)
        case PrefillProgress():
            logprobs = _pack_logprobs(event.logprobs)
            return (_PREFILL, event.done_tokens, event.total_tokens, logprobs)
        case Finished(reason, usage, timing, stop, mismatches, cache):
            counts = (
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                usage.reasoning_tokens,
            )
            # The router fills in the other times.
            times = (timing.queued_s, timing.prefill_s, timing.decode_s, timing.throttled_s)
            reuse = None if cache is None else astuple(cache)
            return (_FINISHED, reason, counts, times, stop, mismatches, reuse)
    raise TypeError(f"cannot encode a {type(event).__name__}")


def _unpack(data: list[Any]) -> GenerationEvent:
    kind = data[0]
    # The common case comes first; its logprobs are decoded only if there are any.
    if kind == _TEXT:
        return TextDelta(data[1], tuple(data[2]), _unpack_logprobs(data[3]) if data[3] else ())
    if kind == _REASONING:
        return ReasoningDelta(data[1], tuple(data[2]))
    if kind == _TOOL_CALL:
        return ToolCallDelta(data[1], data[2], data[3], data[4], tuple(data[5]))
    if kind == _PREFILL:
        return PrefillProgress(data[1], data[2], _unpack_logprobs(data[3]))
    if kind == _FINISHED:
        queued_s, prefill_s, decode_s, throttled_s = data[3]
        timing = Timing(queued_s, prefill_s, decode_s, throttled_s=throttled_s)
        cache = CacheOutcome(*data[6]) if data[6] else None
        return Finished(data[1], Usage(*data[2]), timing, data[4], tuple(data[5]), cache)
    if kind == _LOST:
        raise _SenderLost
    raise ValueError(f"unknown event {kind}")


def _pack_logprobs(entries: Sequence[TokenLogprob]) -> list[Any]:
    return [
        (entry.token_id, entry.data, entry.logprob, _pack_logprobs(entry.top)) for entry in entries
    ]


def _unpack_logprobs(entries: list[Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token_id, data, logprob, _unpack_logprobs(top))
        for token_id, data, logprob, top in entries
    )
