"""The limits of bodies: the same in every API, counted before validation, with both numbers."""

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from router.app import create_app
from router.requests.limits import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_FIELDS,
    MAX_FIELDS_PER_OBJECT,
    MAX_ITEM_CONTAINERS,
    MAX_ITEM_FIELDS,
    MAX_ITEM_VALUES,
    MAX_MESSAGES,
    MAX_NUMBER_CHARACTERS,
    MAX_PARTS,
    MAX_SCHEMA_BYTES,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    MAX_VALUES,
)
from tests.fakes import CHAT_MODEL, EMBEDDING_MODEL, RERANK_MODEL, FakeDispatcher, make_services
from tests.live_server import client_of

USER = {"role": "user", "content": "hi"}
CHAT = {"model": CHAT_MODEL, "messages": [USER]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": {**CHAT, "max_tokens": 5},
    "/v1/messages/count_tokens": CHAT,
    "/v1/responses": {"model": CHAT_MODEL, "input": [USER]},
    "/v1/responses/input_tokens": {"model": CHAT_MODEL, "input": [USER]},
    "/v1/completions": {"model": CHAT_MODEL, "prompt": "hi"},
    "/v1/embeddings": {"model": EMBEDDING_MODEL, "input": ["hi"]},
    "/v1/rerank": {"model": RERANK_MODEL, "query": "q", "documents": ["hi"]},
    "/tokenize": {"model": CHAT_MODEL, "content": "hi"},
    "/apply-template": CHAT,
    "/detokenize": {"model": CHAT_MODEL, "tokens": [104, 105]},
}
CONVERSATIONS = [path for path in BODIES if "messages" in BODIES[path] or "responses" in path]
TEXT_TYPES = {"/v1/responses": "input_text", "/v1/responses/input_tokens": "input_text"}


def encoded(path: str, **fields: Any) -> bytes:
    return json.dumps({**BODIES[path], **fields}).encode()


def raw(path: str, name: str, value: bytes) -> bytes:
    """Return the API's body with one more field, whose value need not be JSON."""
    return encoded(path)[:-1] + b', "' + name.encode() + b'": ' + value + b"}"


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


# What every API refuses, with the limit that the error names.
COUNTED: dict[str, tuple[bytes, int]] = {
    "values": (b"[" + b"1," * MAX_VALUES + b"1]", MAX_VALUES),
    "values, spread": (b"[" + b"[1,1]," * (MAX_CONTAINERS + 9) + b"1]", MAX_CONTAINERS),
    "fields": (b"[" + b'{"a":1},' * MAX_FIELDS + b'{"a":1}]', MAX_FIELDS),
    "containers": (b"[" + b"[]," * MAX_CONTAINERS + b"1]", MAX_CONTAINERS),
    "fields of one item": (
        b"[[" + b'{"a":1},' * (MAX_ITEM_FIELDS + 1) + b"1], 1]",
        MAX_ITEM_FIELDS,
    ),
    "containers of one item": (
        b"[1, [" + b"[]," * MAX_ITEM_CONTAINERS + b"1]]",
        MAX_ITEM_CONTAINERS,
    ),
    "values of one item": (b"[[" + b"1," * MAX_ITEM_VALUES + b"1]]", MAX_ITEM_VALUES),
    "fields of one object": (
        b"{" + b",".join(b'"f%d":1' % index for index in range(MAX_FIELDS_PER_OBJECT * 17)) + b"}",
        MAX_ITEM_FIELDS,
    ),
    "depth": (b'["' + b"x" * 70_000 + b'",' + nested(MAX_DEPTH) + b"]", MAX_DEPTH),
    "digits": (b"1" * (MAX_NUMBER_CHARACTERS + 1), MAX_NUMBER_CHARACTERS),
    "digits of a fraction": (b"0." + b"1" * MAX_NUMBER_CHARACTERS, MAX_NUMBER_CHARACTERS),
    "digits in a large body": (
        b'["' + b"x" * 70_000 + b'",' + b"1" * 100_000 + b"]",
        MAX_NUMBER_CHARACTERS,
    ),
}


@pytest.fixture(scope="module")
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher()


@pytest.fixture(scope="module")
def app(dispatcher: FakeDispatcher) -> FastAPI:
    return create_app(make_services(dispatcher))


async def post(app: FastAPI, path: str, body: bytes) -> httpx.Response:
    async with client_of(app) as http:
        headers = {"content-type": "application/json"}
        return await http.post(path, content=body, headers=headers)


def message_of(response: httpx.Response, path: str) -> str:
    """Return the error's text; its envelope is that of the API, and short."""
    body = response.json()
    assert (body.get("type") == "error") == path.startswith("/v1/messages")
    message = body["error"]["message"]
    assert isinstance(message, str)
    assert len(response.content) < 1000
    return message


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", COUNTED)
async def test_what_is_over_a_limit_is_400_with_the_limit_in_every_api(
    app: FastAPI, dispatcher: FakeDispatcher, path: str, name: str
) -> None:
    value, limit = COUNTED[name]
    before = len(dispatcher.requests)
    response = await post(app, path, raw(path, "unknown", value))
    assert response.status_code == 400, response.text[:300]
    assert f"{limit:,}" in message_of(response, path)
    assert len(dispatcher.requests) == before


def list_cases() -> list[tuple[str, str, dict[str, Any], int]]:
    """Return (path, list, fields with one item too many, limit)."""
    cases: list[tuple[str, str, dict[str, Any], int]] = []
    for path in CONVERSATIONS:
        messages = "input" if "responses" in path else "messages"
        part = {"type": TEXT_TYPES.get(path, "text"), "text": "x"}
        many_parts = {"role": "user", "content": [part] * (MAX_PARTS + 1)}
        cases.append((path, messages, {messages: [USER] * (MAX_MESSAGES + 1)}, MAX_MESSAGES))
        cases.append((path, f"{messages}[0].content", {messages: [many_parts]}, MAX_PARTS))
        cases.append((path, "tools", {"tools": [{}] * (MAX_TOOLS + 1)}, MAX_TOOLS))
        wide = {**USER, **{f"f{index}": 1 for index in range(MAX_FIELDS_PER_OBJECT - 1)}}
        cases.append((path, f"{messages}[1]", {messages: [USER, wide]}, MAX_FIELDS_PER_OBJECT))
    calls = {"role": "assistant", "tool_calls": [{"id": 1}] * (MAX_TOOL_CALLS + 1)}
    path = "/v1/chat/completions"
    cases.append((path, "messages[0].tool_calls", {"messages": [calls]}, MAX_TOOL_CALLS))
    result = {"type": "tool_result", "content": [{"type": 1}] * (MAX_PARTS + 1)}
    block = {"role": "user", "content": [result]}
    path = "/v1/messages"
    cases.append((path, "messages[0].content[0].content", {"messages": [block]}, MAX_PARTS))
    output = {"type": "function_call_output", "output": [{"type": 1}] * (MAX_PARTS + 1)}
    cases.append(("/v1/responses", "input[0].output", {"input": [output]}, MAX_PARTS))
    cases.append(("/v1/embeddings", "input", {"input": ["x"] * 2049}, 2048))
    return cases


@pytest.mark.parametrize(("path", "param", "fields", "limit"), list_cases())
async def test_lists_are_counted_before_their_items_are_validated(
    app: FastAPI, path: str, param: str, fields: dict[str, Any], limit: int
) -> None:
    response = await post(app, path, encoded(path, **fields))
    assert response.status_code == 400
    message = message_of(response, path)
    assert message.startswith(f"{param}: has {limit + 1:,}"), message
    assert f"{limit:,} are accepted" in message


@pytest.mark.parametrize("path", CONVERSATIONS)
async def test_bodies_at_the_limits_are_answered(app: FastAPI, path: str) -> None:
    messages = "input" if "responses" in path else "messages"
    part = {"type": TEXT_TYPES.get(path, "text"), "text": "x"}
    full = [USER] * (MAX_MESSAGES - 1) + [{"role": "user", "content": [part] * MAX_PARTS}]
    wide = {f"f{index}": 1 for index in range(MAX_FIELDS_PER_OBJECT - 5)}
    response = await post(app, path, encoded(path, **{messages: full}, **wide))
    assert response.status_code == 200, response.text[:300]


@pytest.mark.parametrize("path", CONVERSATIONS)
async def test_schemas_of_tools_are_bounded_alike(app: FastAPI, path: str) -> None:
    schema = {"type": "object", "description": "x" * MAX_SCHEMA_BYTES}
    tool: dict[str, Any] = {"name": "f", "input_schema": schema}
    if path in ("/v1/chat/completions", "/apply-template"):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    elif "responses" in path:
        tool = {"type": "function", "name": "f", "parameters": schema}
    response = await post(app, path, encoded(path, tools=[tool]))
    assert response.status_code == 400
    assert "larger than 256.0 KiB" in message_of(response, path)


@pytest.mark.parametrize("path", BODIES)
async def test_the_first_invalid_item_is_reported_alone(app: FastAPI, path: str) -> None:
    bad: dict[str, Any] = {"role": 7, "content": [{"type": 1, "x": "y" * 100}] * 50}
    names = ("messages", "input", "prompt", "documents", "content", "tokens")
    name = next(name for name in names if name in BODIES[path])
    response = await post(app, path, encoded(path, **{name: [bad] * 1000}))
    assert response.status_code == 400
    assert message_of(response, path)


async def test_values_are_echoed_short_and_escaped(app: FastAPI) -> None:
    evil = "\u202e\x1b[31m\r\n" + "x" * 100_000
    fields: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"model": evil}),
        ("/v1/chat/completions", {"messages": [{"role": evil, "content": "x"}]}),
        ("/v1/chat/completions", {"tools": [{"type": "custom", "custom": {"format": evil}}]}),
        ("/v1/chat/completions", {"tool_choice": {"type": evil}}),
        ("/v1/chat/completions", {"chat_template_kwargs": {evil: evil}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": evil}]}]}),
        ("/v1/responses", {"previous_response_id": evil}),
        ("/v1/responses", {"tool_choice": {"type": evil}}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": evil}]}]}),
    ]
    for path, changes in fields:
        response = await post(app, path, encoded(path, **changes))
        assert response.status_code in (400, 404), changes
        message = message_of(response, path)
        assert message.replace("\n", "").isprintable(), message
        assert len(message) < 500
