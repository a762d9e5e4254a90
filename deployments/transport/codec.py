"""Encodes generation events as msgpack frames, one frame per engine step."""

import struct
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import msgpack

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

_LENGTH = struct.Struct("<I")
LENGTH_BYTES = _LENGTH.size
# A larger frame can only be a bug of the sender.
MAX_FRAME_BYTES = 64 * 1024 * 1024

_TEXT, _REASONING, _TOOL_CALL, _PREFILL, _FINISHED = range(5)

StepEvents = Sequence[tuple[str, Sequence[GenerationEvent]]]


def encode_frame(batch: StepEvents) -> bytes:
    """Return one frame: a little-endian uint32 length, then msgpack."""
    body: bytes = msgpack.packb(
        [(request_id, [_pack(event) for event in events]) for request_id, events in batch]
    )
    return _LENGTH.pack(len(body)) + body


def decode_length(data: bytes | bytearray, offset: int) -> int:
    """Return the body length of the frame at `offset`.  Raises ValueError over the maximum."""
    length: int = _LENGTH.unpack_from(data, offset)[0]
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
    return length


def decode_body(body: bytes | bytearray | memoryview) -> list[tuple[str, list[GenerationEvent]]]:
    """Return the (request id, events) pairs of a frame's body."""
    return [
        (request_id, [_unpack(event) for event in events])
        for request_id, events in msgpack.unpackb(body)
    ]


def _pack(event: GenerationEvent) -> tuple[Any, ...]:
    match event:
        case TextDelta():
            return (_TEXT, event.text, event.token_ids, _pack_logprobs(event.logprobs))
        case ReasoningDelta():
            return (_REASONING, event.text, event.token_ids)
        case ToolCallDelta():
            return (_TOOL_CALL, event.index, event.id, event.name, event.arguments, event.token_ids)
        case PrefillProgress():
            return (_PREFILL, event.done_tokens, event.total_tokens)
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
        return PrefillProgress(data[1], data[2])
    if kind == _FINISHED:
        queued_s, prefill_s, decode_s, throttled_s = data[3]
        timing = Timing(queued_s, prefill_s, decode_s, throttled_s=throttled_s)
        cache = CacheOutcome(*data[6]) if data[6] else None
        return Finished(data[1], Usage(*data[2]), timing, data[4], tuple(data[5]), cache)
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
