"""Hostile values anywhere in a request: an answer or a clear error, never a 500."""

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.app import create_app
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of

DEEP = 100_000
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "x", "tool_call_id": "c"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "stop": ["a"], "logit_bias": {"1": 1}, "n": 2, "chat_template_kwargs": {"a": 1},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "reasoning": {"effort": "low"}, "user": "u", "unknown": 1,
    },
    "/v1/completions": {
        "model": "tiny", "prompt": ["a", "b"], "suffix": None, "stop": "a", "echo": False,
        "logprobs": 1, "seed": 1,
    },
    "/v1/messages": {
        "model": "tiny", "max_tokens": 9, "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "", "signature": "eHg="},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c",
                 "content": [{"type": "text", "text": "x"}]}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "f"}, "stop_sequences": ["a"], "metadata": {},
        "output_config": {"format": {"type": "json_schema", "schema": {}}, "effort": "low"},
    },
    "/v1/responses": {
        "model": "tiny", "instructions": "i", "metadata": {"a": "b"},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "eHg="},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
        "tools": [{"type": "function", **TOOL}], "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
        "include": ["reasoning.encrypted_content"], "previous_response_id": None,
    },
    "/v1/embeddings": {
        "model": "mini", "input": ["a"], "dimensions": 3, "truncate": "END", "prompt_name": "query",
    },
    "/v1/rerank": {
        "model": "ranker", "query": "q", "documents": ["a", {"text": "b"}], "top_n": 1,
        "return_documents": True, "truncate": True, "max_tokens_per_doc": 3,
    },
}  # fmt: skip
BODIES["/v1/messages/count_tokens"] = {
    key: value
    for key, value in BODIES["/v1/messages"].items()
    if key not in ("max_tokens", "stop_sequences")
}
BODIES["/v1/responses/input_tokens"] = BODIES["/v1/responses"]
BODIES["/apply-template"] = BODIES["/v1/chat/completions"]
BODIES["/tokenize"] = {"model": "tiny", "content": "hi", "add_special": True}
BODIES["/detokenize"] = {"model": "tiny", "tokens": [104, 105]}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = st.sampled_from([
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**300, 1e308, -0.0, "", " ", "\0", "\u2028", "😀",
    "\ud800", "x" * 10_000, "[" * DEEP, '{"a":' * DEEP, '{"a":"\\ud800"}', "{", "NaN", "eHg", "==",
    [], {}, [[]], [None], [[[]]], {"": {}}, {"\0": None}, {"$ref": "#"}, nested(150), [1] * 5000,
    {"type": "object", "properties": nested(60)}, {"type": None}, {"type": "text"},
    [{"type": "text", "text": "\ud800"}], [{"type": "tool_use"}], {"a": nested(190)},
    float("nan"), float("inf"), "data: [DONE]\n\n", "none", "required", {"type": "function"},
])  # fmt: skip


def places(value: Any) -> Iterator[tuple[int | str, ...]]:
    """Yield the path of every value within `value`."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (key,)
        yield from ((key, *path) for path in places(inner))


def replaced(body: dict[str, Any], path: tuple[int | str, ...], value: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    inner: Any = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return body


@pytest.mark.parametrize("path", BODIES)
def test_no_value_in_a_request_gives_a_500(path: str) -> None:
    app = create_app(make_services(FakeDispatcher()))

    async def post(body: dict[str, Any]) -> tuple[int, Any]:
        async with client_of(app) as client:
            headers = {"content-type": "application/json"}
            response = await client.post(path, content=json.dumps(body), headers=headers)
        is_stream = response.headers["content-type"].startswith("text/event-stream")
        return response.status_code, None if is_stream else response.json()

    with asyncio.Runner() as loop:
        status, answer = loop.run(post(BODIES[path]))
        assert status == 200, answer

        @settings(
            max_examples=100,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.sampled_from(list(places(BODIES[path]))), HOSTILE, st.booleans())
        def check(place: tuple[int | str, ...], value: Any, is_streamed: bool) -> None:
            body = replaced(BODIES[path], place, value)
            if is_streamed:
                body["stream"] = True
            status, answer = loop.run(post(body))
            assert status in (200, 400, 404, 413), (place, answer)
            if status != 200:
                assert answer["error"]["message"]

        check()


@pytest.mark.parametrize(
    "arguments",
    [
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        '{"a":"\\ud800"}',
        '{"a":{"\\udc00":1}}',
        '{"a":"\\ud83d\\ude00 \\\\ud800"}',
        "not JSON \\ud800",
        '{"a":' + "9" * DEEP + "}",
        "",
    ],
)
async def test_no_arguments_in_a_history_are_refused(arguments: str) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    user = {"role": "user", "content": "hi"}
    body = {"messages": [user, {"role": "assistant", "tool_calls": [call]}, user]}
    async with client_of(create_app(make_services(FakeDispatcher()))) as client:
        response = await client.post("/v1/chat/completions", json={"model": "tiny", **body})
        assert response.status_code == 200, response.text


HALF = r"before \ud83d after"
WITH_HALF = {
    "/v1/chat/completions": '{"model":"tiny","messages":[{"role":"user","content":"%s"}]}',
    "/v1/completions": '{"model":"tiny","prompt":"%s"}',
    "/v1/messages": '{"model":"tiny","max_tokens":4,"messages":[{"role":"user","content":[{"type":'
    '"tool_result","tool_use_id":"c","content":"%s"}]}]}',
    "/v1/responses": '{"model":"tiny","store":false,"input":"%s"}',
}


@pytest.mark.parametrize("path", WITH_HALF)
async def test_half_a_surrogate_pair_ends_no_session(path: str) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post(
            path,
            content=(WITH_HALF[path] % HALF).encode("ascii"),
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 200, response.text
    assert "before \ufffd after" in repr(dispatcher.requests[0].prompt)


async def test_deep_input_of_a_tool_is_refused_by_its_depth() -> None:
    block = '{"type":"tool_use","id":"c","name":"f","input":{"a":' + "[" * DEEP + "]" * DEEP + "}}"
    body = (
        '{"model":"tiny","max_tokens":9,"messages":[{"role":"assistant","content":[' + block + "]},"
        '{"role":"user","content":"hi"}]}'
    )
    async with client_of(create_app(make_services(FakeDispatcher()))) as client:
        response = await client.post(
            "/v1/messages", content=body, headers={"content-type": "application/json"}
        )
    assert response.status_code == 400
    assert "200" in response.json()["error"]["message"]
