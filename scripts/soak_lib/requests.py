"""Requests of the soak test's clients, good and hostile, with the statuses that each may get."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.units import MIB

_CHAT = "/v1/chat/completions"
_WORDS = ("river", "engine", "number", "window", "letter", "garden", "metal", "story", "winter")


@dataclass(frozen=True, slots=True)
class Sent:
    """One request: `body` as sent, the statuses that are right, and when its client leaves.

    `leaves_after` is a number of stream events; None reads to the end.
    """

    kind: str
    path: str
    body: bytes
    right: frozenset[int] = frozenset({200})
    is_stream: bool = False
    leaves_after: int | None = None


def _prompt(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(_WORDS, k=words))


def _chat(chance: random.Random, model: str, **fields: Any) -> dict[str, Any]:
    text = f"Continue: {_prompt(chance, chance.randint(5, 120))}"
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 24}
    return {**body, **fields}


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _streamed(chance: random.Random, model: str) -> Sent:
    return Sent("stream", _CHAT, _json(_chat(chance, model, stream=True)), is_stream=True)


def _cancelled(chance: random.Random, model: str) -> Sent:
    body = _chat(chance, model, stream=True, max_tokens=400)
    return Sent("cancelled", _CHAT, _json(body), is_stream=True, leaves_after=chance.randint(0, 12))


def _whole(chance: random.Random, model: str) -> Sent:
    return Sent("whole", _CHAT, _json(_chat(chance, model, n=chance.randint(1, 2))))


def _completion(chance: random.Random, model: str) -> Sent:
    body = {"model": model, "prompt": _prompt(chance, 20), "max_tokens": 16, "stream": True}
    return Sent("completion", "/v1/completions", _json(body), is_stream=True)


def _message(chance: random.Random, model: str) -> Sent:
    body = _chat(chance, model, stream=True)
    return Sent("message", "/v1/messages", _json(body), is_stream=True)


def _response(chance: random.Random, model: str) -> Sent:
    body = {"model": model, "input": _prompt(chance, 20), "max_output_tokens": 24, "stream": True}
    return Sent("response", "/v1/responses", _json(body), is_stream=True)


def _formatted(chance: random.Random, model: str) -> Sent:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": chance.randint(0, 99)}},
        "required": ["n"],
    }
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = _chat(chance, model, response_format=shape, max_tokens=32)
    return Sent("formatted", _CHAT, _json(body))


def _oversized(chance: random.Random, model: str) -> Sent:
    body = _chat(chance, model, user="x" * (17 * MIB))
    return Sent("oversized", _CHAT, _json(body), right=frozenset({413}))


def _large(chance: random.Random, model: str) -> Sent:
    body = _chat(chance, model)
    body["messages"][0]["content"] = _prompt(chance, 900_000)
    return Sent("large", _CHAT, _json(body), right=frozenset({400, 413}))


def _one_letter(chance: random.Random, model: str) -> Sent:
    body = _chat(chance, model)
    body["messages"][0]["content"] = chance.choice("a 中.é") * 30_000
    return Sent("one letter", _CHAT, _json(body), right=frozenset({200, 400}))


def _hostile_schema(chance: random.Random, model: str) -> Sent:
    number = {"type": "integer", "multipleOf": chance.choice((999_983, 123_456_789, 1e-9))}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"]}
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = _chat(chance, model, response_format=shape)
    return Sent("hostile schema", _CHAT, _json(body), right=frozenset({200, 400}))


def _many_messages(chance: random.Random, model: str) -> Sent:
    body = _chat(chance, model)
    body["messages"] = [{"role": "user", "content": [{"type": "text"}]}] * 60_000
    return Sent("many messages", _CHAT, _json(body), right=frozenset({400, 413}))


def _deep(chance: random.Random, model: str) -> Sent:
    depth = chance.choice((250, 20_000))
    tail = b',"metadata":' + b"[" * depth + b"]" * depth + b"}"
    body = _json(_chat(chance, model))[:-1] + tail
    return Sent("deep", _CHAT, body, right=frozenset({400}))


def _unknown_model(chance: random.Random, model: str) -> Sent:
    del model
    body = _chat(chance, f"nothing-{chance.randrange(1_000)}")
    return Sent("unknown model", _CHAT, _json(body), right=frozenset({404}))


def _broken_json(chance: random.Random, model: str) -> Sent:
    whole = _json(_chat(chance, model))
    cut = whole[: chance.randrange(1, len(whole) - 1)]
    return Sent("broken JSON", _CHAT, cut, right=frozenset({400}))


def _surrogate(chance: random.Random, model: str) -> Sent:
    body = _json(_chat(chance, model)).replace(b"Continue", b"\\ud83d")
    return Sent("surrogate", _CHAT, body)


# Each once troubled requests that had nothing to do with it.
PATHOLOGICAL: Sequence[Callable[[random.Random, str], Sent]] = (
    _oversized,
    _large,
    _one_letter,
    _hostile_schema,
    _deep,
    _many_messages,
    _surrogate,
    _unknown_model,
    _broken_json,
)
_MIX: Mapping[Callable[[random.Random, str], Sent], int] = {
    _streamed: 30,
    _cancelled: 20,
    _whole: 10,
    _completion: 5,
    _message: 5,
    _response: 5,
    _formatted: 5,
    _unknown_model: 4,
    _broken_json: 4,
    _deep: 3,
    _surrogate: 3,
    _one_letter: 2,
    _hostile_schema: 2,
    _many_messages: 1,
    _oversized: 1,
    _large: 1,
}


def next_request(chance: random.Random, models: Sequence[str]) -> Sent:
    """Return a random request for one of the models."""
    (make,) = chance.choices(list(_MIX), weights=list(_MIX.values()))
    return make(chance, chance.choice(models))
