"""Seeded fuzz of all APIs: no body is answered with a 5xx, and every answer is that API's JSON."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from router.app import create_app
from tests.fakes import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    MANAGING,
    RERANK_MODEL,
    FakeDispatcher,
    make_services,
)
from tests.live_server import client_of
from tests.unit.router.api.test_router_api import FakeManagement

SEED = 20_261
MUTATIONS = 400
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "stop": ["x"],
    "logit_bias": {"5": 1},
    "seed": 7,
    "user": "me",
    "service_tier": "flex",
}
# One full body for each endpoint, from which hostile ones are made.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": CHAT_MODEL,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        "reasoning": {"effort": "low", "max_tokens": 5},
        "chat_template_kwargs": {"a": 1},
        "stream_options": {"include_usage": True},
        "stream": True,
        "n": 2,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
        **SAMPLING,
    },
    "/v1/completions": {
        "model": CHAT_MODEL,
        "prompt": ["hi", "there"],
        "max_tokens": 5,
        "guided_regex": "a+",
        "logprobs": 1,
        "echo": False,
        "suffix": None,
        **SAMPLING,
    },
    "/v1/embeddings": {
        "model": EMBEDDING_MODEL,
        "input": ["hi", "there"],
        "encoding_format": "base64",
        "dimensions": 3,
        "truncate": False,
        "input_type": "query",
    },
    "/v1/rerank": {
        "model": RERANK_MODEL,
        "query": {"text": "q"},
        "documents": ["a", {"text": "b"}],
        "top_n": 1,
        "return_documents": True,
    },
    "/v1/responses": {
        "model": CHAT_MODEL,
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "eA=="},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "4"},
        ],
        "instructions": "be brief",
        "previous_response_id": None,
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        "reasoning": {"effort": "low"},
        "include": ["reasoning.encrypted_content"],
        "metadata": {"a": "b"},
        "max_output_tokens": 5,
        **SAMPLING,
    },
    "/v1/messages": {
        "model": CHAT_MODEL,
        "max_tokens": 50,
        "system": [{"type": "text", "text": "be brief"}],
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"city": "X"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t",
                        "content": [{"type": "text", "text": "4"}],
                    },
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        "stop_sequences": ["x"],
        "stream": False,
    },
}
BODIES["/v1/messages/count_tokens"] = {
    name: value
    for name, value in BODIES["/v1/messages"].items()
    if name not in ("max_tokens", "stop_sequences", "stream")
}
BODIES["/v1/responses/input_tokens"] = BODIES["/v1/responses"]
BODIES[f"/api/models/{CHAT_MODEL}"] = {"keep_alive_s": 3.0, "pin": True, "kv_type": "f16"}
BODIES[f"/api/models/{CHAT_MODEL}/load"] = {"model": {}}
BODIES["/api/drain"] = {"force": [1]}

# What takes the place of a value, as JSON text that need not be valid.
HOSTILE: list[bytes] = [
    b"null", b"true", b"0", b"-1", b"1.5", b"1e999", b"-1e999", b"NaN", b"Infinity", b"-0",
    b"1e-999",
    b"9" * 30, b"9" * 400, b"9" * 5000, b"1" * 100_000, b"0." + b"3" * 100_000, b"1e" + b"9" * 2000,
    b'""', b'"x"', b'"' + b"x" * 300_000 + b'"', b'"\\ud83d"', b'"\\udc00\\ud800"', b'"\\u0000"',
    b'"\x00"', b'"\xff\xfe"', b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"\xf0\x9f"', b'"\\x"', b'"\n"',
    '"\u202e\u2066evil\u2028"'.encode(), b'"\\u001b[31m\\r\\n"', b'"' + b"\\n" * 50_000 + b'"',
    b"[]", b"{}", b"[null]", b"[[]]", b"[{}]", b'{"":{}}', b'{"a":1,"a":2}', b'[1,"a",null,{}]',
    b"[" * 300, b"[" * 190 + b"]" * 190, b'{"a":' * 150 + b"1" + b"}" * 150, b"[" * 100_000,
    b'{"a":' * 100_000, b"[" + b"{}," * 20_000 + b"{}]", b"[" + b"1," * 60_000 + b"1]",
    b'[{"type":1}]', b'[{"type":"image_url","image_url":{"url":"file:///etc/passwd"}}]',
    b'{"type":"function"}', b'{"$ref":"#"}', b'{"type":"object","properties":{"a":{"$ref":"#"}}}',
    b'{"' + b"k" * 100_000 + b'":1}', b'"../../etc/passwd"', b"tru", b"'x'", b"/**/1", b"1,2", b"",
]  # fmt: skip

WHOLE: list[bytes] = [
    b"", b" ", b"\x00", b"null", b"[]", b"1", b'"x"', b"{", b"}", b"{}", b"[" * 100_000,
    b"\xff" * 9,
    b"{}{}", b"{},", b"\xef\xbb\xbf{}", b'{"model":"m"', b'{"model"}', b"{" * 100_000, b"{}\x00",
    '{"model":"m"}'.encode("utf-16"), '{"model":"m"}'.encode("utf-32"), b'{"a":1' + b" " * 200_000,
    b'{"model":"' + b"x" * 500_000 + b'"}', b"\\" * 100_000, b'"' * 100_001, b"," * 100_000,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a body."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], change: Callable[[Any], bytes]) -> bytes:
    """Return the body as JSON text with the value at `path` replaced."""
    mark = "\x00mark"
    if not path:
        return change(value)

    def copy(inner: Any, rest: tuple[Any, ...]) -> Any:
        if not rest:
            return mark
        if isinstance(inner, dict):
            return {k: copy(v, rest[1:]) if k == rest[0] else v for k, v in inner.items()}
        return [copy(v, rest[1:]) if i == rest[0] else v for i, v in enumerate(inner)]

    old = value
    for key in path:
        old = old[key]
    text = json.dumps(copy(value, path)).encode()
    return text.replace(json.dumps(mark).encode(), change(old))


def constant(new: bytes, old: Any) -> bytes:
    del old
    return new


def repeated(count: int, old: Any) -> bytes:
    return json.dumps([old] * count).encode()


def hostile_bodies(path: str, random_: random.Random) -> Iterator[bytes]:
    body = BODIES[path]
    yield from WHOLE
    spots = list(places(body))
    for _ in range(MUTATIONS):
        spot = random_.choice(spots)
        kind = random_.randrange(8)
        if kind < 5:
            hostile = random_.choice(HOSTILE)
            yield replaced(body, spot, partial(constant, hostile))
        elif kind == 5:
            # A field of the same name again, or an unknown one.
            name = random_.choice([*body, "unknown", "\u202e", "x" * 5000, ""])
            text = json.dumps(body)[:-1] + f", {json.dumps(name)}: "
            yield text.encode() + random_.choice(HOSTILE) + b"}"
        elif kind == 6:
            # Many of the same.
            count = random_.choice([3, 130, 5000])
            yield replaced(body, spot, partial(repeated, count))
        else:
            # Bytes changed, removed and inserted anywhere.
            text_bytes = bytearray(json.dumps(body).encode())
            for _ in range(random_.randint(1, 6)):
                at = random_.randrange(len(text_bytes))
                text_bytes[at : at + random_.randrange(3)] = random_.randbytes(random_.randrange(3))
            yield bytes(text_bytes)


@pytest.fixture
def app() -> FastAPI:
    services = make_services(FakeDispatcher())
    return create_app(replace(services, management=FakeManagement()))


def check_answer(response: httpx.Response, path: str, body: bytes) -> None:
    shown = (path, response.status_code, response.text[:300], body[:300])
    assert response.status_code < 500, shown
    content = response.content.decode("utf-8")
    if response.status_code == 200 and response.headers["content-type"].startswith("text/event"):
        return
    answer = json.loads(content)
    if response.status_code == 200:
        return
    error = answer["error"]
    if path.startswith("/v1/messages"):
        assert set(answer) == {"type", "error", "request_id"}, shown
        assert set(error) == {"type", "message"}, shown
        assert answer["type"] == "error", shown
    else:
        assert set(answer) == {"error"}, shown
        assert set(error) == {"message", "type", "param", "code"}, shown
        assert error["code"] != "internal_error"
    assert isinstance(error["message"], str), shown
    assert error["message"], shown
    assert error["message"].isprintable(), shown
    assert len(error["message"]) < 1000, shown
    assert response.headers["x-request-id"], shown


@pytest.mark.parametrize("path", BODIES)
async def test_no_body_is_answered_with_a_5xx(app: FastAPI, path: str) -> None:
    random_ = random.Random(f"{SEED} {path}")
    method = "PATCH" if path == f"/api/models/{CHAT_MODEL}" else "POST"
    statuses: dict[int, int] = {}
    async with client_of(app, **MANAGING) as http:
        for body in hostile_bodies(path, random_):
            response = await asyncio.wait_for(
                http.request(
                    method, path, content=body, headers={"content-type": "application/json"}
                ),
                60,
            )
            check_answer(response, path, body)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
    # The fuzz reaches beyond the parser.
    assert statuses[400] > 50
    assert set(statuses) <= {200, 400, 404, 413}


@pytest.mark.parametrize("path", [path for path in BODIES if path.startswith("/v1/")])
async def test_the_bodies_that_are_changed_are_answered(app: FastAPI, path: str) -> None:
    async with client_of(app, **MANAGING) as http:
        response = await http.post(path, json=BODIES[path])
    assert response.status_code == 200, response.text
