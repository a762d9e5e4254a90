"""Builds answers of Anthropic's Messages API: content blocks, usage, stop reason.

Anthropic's description requires every field that its service knows; one without a value is null.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

import jiter

from core.types import Finished, GenerationEvent, JsonValue, PrefillProgress, Usage
from router.answers.parts import Part
from router.requests.reasoning import encode_reasoning

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Anthropic signs its reasoning; clients only store the field and send it back.
SIGNATURE = "unsigned"


def message(
    message_id: str,
    model_id: str,
    content: Sequence[JsonValue],
    usage: JsonValue,
    ending: dict[str, JsonValue],
) -> dict[str, JsonValue]:
    """Return a message; `usage` is that of `message_usage`, `ending` that of `ending`."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model_id,
        "content": list(content),
        **ending,
        "usage": usage,
    }


def block(part: Part, *, hides_thinking: bool) -> dict[str, JsonValue]:
    """Return a part as a content block."""
    match part.kind:
        case "text":
            return text_block(part.text)
        case "reasoning":
            return {
                "type": "thinking",
                "thinking": "" if hides_thinking else part.text,
                "signature": signature(part, hides_thinking=hides_thinking),
            }
        case "call":
            return call_block(part, _input(part.text))


def text_block(text: str) -> dict[str, JsonValue]:
    """Return a block of text."""
    return {"type": "text", "text": text, "citations": None}


def call_block(part: Part, arguments: JsonValue) -> dict[str, JsonValue]:
    """Return a call, which the model made itself and not a program that it wrote."""
    return {
        "type": "tool_use",
        "id": part.call_id,
        "name": part.name,
        "input": arguments,
        "caller": {"type": "direct"},
    }


def signature(part: Part, *, hides_thinking: bool) -> str:
    """Return the signature field; it contains the encoded reasoning if that is hidden."""
    return encode_reasoning(part.text) if hides_thinking else SIGNATURE


def _input(arguments: str) -> JsonValue:
    """Return a call's arguments as an object; incomplete ones as far as they can be parsed.

    Text that is not a JSON object becomes the single argument `arguments`, so the client sees it.
    """
    if not arguments.strip():
        return {}
    try:
        value: JsonValue = jiter.from_json(
            arguments.encode(), partial_mode="trailing-strings", allow_inf_nan=False
        )
        # A number such as 1e999 is read as infinite, which JSON cannot hold.
        json.dumps(value, allow_nan=False)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def ending(finished: Finished | None, stop_sequences: Sequence[str]) -> dict[str, JsonValue]:
    """Return the fields that tell how an answer ended; all null before the end."""
    unknown: dict[str, JsonValue] = dict.fromkeys(
        ("stop_reason", "stop_sequence", "stop_details", "container")
    )
    if finished is None:
        return unknown
    # A model without a template has its own stop strings, which the request did not contain.
    stop = finished.stop if finished.stop in stop_sequences else None
    is_stopped = stop is not None and finished.reason == "stop"
    return {
        **unknown,
        "stop_reason": "stop_sequence" if is_stopped else _REASONS[finished.reason],
        "stop_sequence": stop if is_stopped else None,
    }


def warmed(event: GenerationEvent) -> GenerationEvent | None:
    """Return what a request with `max_tokens` 0 gets of an event: no answer, and its end.

    Engines compute a prompt only together with a token, which is left out here.
    """
    if not isinstance(event, Finished):
        return event if isinstance(event, PrefillProgress) else None
    usage = replace(event.usage, completion_tokens=0, reasoning_tokens=0)
    return replace(event, reason="length", stop=None, usage=usage)


def message_usage(counts: Usage) -> dict[str, JsonValue]:
    """Return the usage in a message."""
    return {**usage(counts), "cache_creation": None, "inference_geo": None, "service_tier": None}


def usage(counts: Usage) -> dict[str, JsonValue]:
    """Return the usage at the end of a stream: `input_tokens` excludes cached tokens."""
    return {
        "input_tokens": counts.prompt_tokens - counts.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached_tokens,
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"thinking_tokens": counts.reasoning_tokens},
        "server_tool_use": None,
    }
