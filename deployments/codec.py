"""Generation events as msgpack: what travels from a replica to the router, one frame a step."""

import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from core.types import (
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
# Larger frames than this can only be a fault of the sender.
MOST_FRAME_BYTES = 64 * 1024 * 1024

_TEXT, _REASONING, _TOOL_CALL, _PREFILL, _FINISHED = range(5)

StepEvents = Sequence[tuple[str, Sequence[GenerationEvent]]]


def encode_frame(batch: StepEvents) -> bytes:
    """Return one frame: a little-endian uint32 length, then msgpack."""
    body: bytes = msgpack.packb(
        [(request_id, [_pack(event) for event in events]) for request_id, events in batch]
    )
    return _LENGTH.pack(len(body)) + body


def decode_length(data: bytes | bytearray, offset: int) -> int:
    """Return the length of the body of the frame at `offset`.  Raises ValueError when absurd."""
    length: int = _LENGTH.unpack_from(data, offset)[0]
    if length > MOST_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
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
        case Finished(reason, usage, timing):
            counts = (
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                usage.reasoning_tokens,
            )
            return (
                _FINISHED, reason, counts, (timing.queued_s, timing.prefill_s, timing.decode_s)
            )  # fmt: skip


def _unpack(data: list[Any]) -> GenerationEvent:
    match data:
        case [0, text, token_ids, logprobs]:
            return TextDelta(text, tuple(token_ids), _unpack_logprobs(logprobs))
        case [1, text, token_ids]:
            return ReasoningDelta(text, tuple(token_ids))
        case [2, index, call_id, name, arguments, token_ids]:
            return ToolCallDelta(index, call_id, name, arguments, tuple(token_ids))
        case [3, done, total]:
            return PrefillProgress(done, total)
        case [4, reason, counts, seconds]:
            return Finished(reason, Usage(*counts), Timing(*seconds))
    raise ValueError(f"unknown event {data[:1]}")


def _pack_logprobs(entries: Sequence[TokenLogprob]) -> list[Any]:
    return [
        (entry.token_id, entry.data, entry.logprob, _pack_logprobs(entry.top)) for entry in entries
    ]


def _unpack_logprobs(entries: list[Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token_id, data, logprob, _unpack_logprobs(top))
        for token_id, data, logprob, top in entries
    )
