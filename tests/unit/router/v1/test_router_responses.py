"""The Responses API on the wire: what is taken and refused, and the bounds of its store."""

from typing import Any

import pytest

from core.types import ChatMessage, ChatPrompt
from router.app import create_app
from router.v1.responses.store import ResponseStore
from tests.fakes import EMBEDDING_MODEL, FakeDispatcher, make_services
from tests.live_server import client_of, error_of

BODY: dict[str, Any] = {"model": "tiny", "input": "hi"}
TOOL = {"type": "function", "name": "read"}
MESSAGES = tuple(ChatMessage("user", str(number) * 100) for number in range(9))
DEEP: Any = {}
for _ in range(40):
    DEEP = {"properties": DEEP}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": None}, "invalid_request", "input"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": [{"content": "x"}]}, "invalid_request", "input[0].role"),
        ({"input": [{"role": "user"}]}, "invalid_request", "input[0].content"),
        ({"input": [{"role": "robot", "content": "x"}]}, "invalid_request", "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": 1}]}]}, "invalid_request",
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "unsupported_capability", "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
         "invalid_request", "input[0].content[0].text"),

        ({"input": [{"type": "web_search_call"}]}, "invalid_request", "input"),
        ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]},
         "invalid_request", "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]},
         "invalid_request", "input[0].output"),
        ({"tools": [{"type": "function"}]}, "invalid_request", "tools[0].name"),
        ({"tools": [{**TOOL, "parameters": DEEP}]}, "invalid_request", "tools[0].parameters"),
        ({"tools": [TOOL, TOOL]}, "invalid_request", "tools[1].name"),
        ({"tools": [TOOL] * 513}, "invalid_request", "tools"),
        ({"tool_choice": "required"}, "invalid_request", "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "b"}}, "invalid_request", "tool_choice"),
        ({"tool_choice": "maybe"}, "invalid_request", "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "invalid_request", "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "invalid_request", "text.format.type"),
        ({"reasoning": {"effort": "huge"}}, "invalid_request", "reasoning.effort"),
        ({"moderation": {"model": "x"}}, "unsupported_parameter", "moderation"),
        ({"conversation": "c"}, "unsupported_parameter", "conversation"),
        ({"prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
        ({"max_tool_calls": 0}, "invalid_request", "max_tool_calls"),
        ({"chat_template_kwargs": {"a b": 1}}, "invalid_request", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": []}}, "invalid_request", "chat_template_kwargs"),
        ({"max_output_tokens": 0}, "invalid_request", "max_output_tokens"),
        ({"metadata": {"a": 1}}, "invalid_request", "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "invalid_request", "metadata"),
        ({"top_logprobs": 21}, "invalid_request", "top_logprobs"),
        ({"previous_response_id": "resp_x"}, "previous_response_not_found",
         "previous_response_id"),
        ({"model": EMBEDDING_MODEL}, "unsupported_capability", "model"),
    ],
)  # fmt: skip
async def test_bad_request_is_refused_by_name(
    fields: dict[str, Any], code: str, param: str
) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/responses", json={**BODY, **fields})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert dispatcher.requests == []


async def test_values_that_mean_off_are_taken_and_the_unknown_named() -> None:
    fields = {
        "background": False,
        "truncation": "disabled",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": "none", "summary": "auto"},
        "stream_options": {"include_obfuscation": False},
        "service_tier": "auto",
        "prompt_cache_key": "x",
        "metadata": {"a": "b"},
        "new_field": 1,
    }
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/responses", json={**BODY, **fields})
    assert response.headers["x-impetus-ignored"] == "new_field"
    assert response.headers["x-impetus-timing"].startswith("queued;dur=")
    body = response.json()
    assert body["metadata"] == {"a": "b"}
    assert body["reasoning"] == {"effort": "none", "summary": None}
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_kwargs == {"enable_thinking": False, "thinking": False}


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"verbosity": "low", "x": 1}}, "text.verbosity, text.x"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"summary": "none", "effort": None}}, None),
        ({"stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation"),
        ({"include": ["file_search_call.results", "new.thing"]}, "include[1]"),
        ({"include": ["code_interpreter_call.outputs", "web_search_call.action.sources"]}, None),
        ({"max_tool_calls": 3}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_hints_change_nothing_and_are_named(
    fields: dict[str, Any], ignored: str | None, stream: bool
) -> None:
    async with client_of(create_app(make_services())) as client:
        response = await client.post("/v1/responses", json={**BODY, **fields, "stream": stream})
    assert response.status_code == 200
    assert response.headers.get("x-impetus-ignored") == ignored


async def test_variables_of_the_template_are_taken_as_in_chat_completions() -> None:
    dispatcher = FakeDispatcher()
    fields = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning": {"effort": "low"}}
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/responses", json={**BODY, **fields})
    assert response.status_code == 200
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_kwargs["enable_thinking"] is False
    assert prompt.template_kwargs["reasoning_effort"] == "low"


async def test_schema_comes_back_under_its_own_name() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    async with client_of(create_app(make_services())) as client:
        body = {**BODY, "text": {"format": form}}
        response = await client.post("/v1/responses", json=body)
        stored = await client.get(f"/v1/responses/{response.json()['id']}")
    assert response.json()["text"]["format"] == stored.json()["text"]["format"] == form


@pytest.mark.parametrize(
    "fields", [{"chat_template": "{{ evil }}"}, {"chat_template_kwargs": {"tokenize": True}}]
)
async def test_template_of_the_client_is_refused_i7(fields: dict[str, Any]) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/responses", json={**BODY, **fields})
    assert error_of(response)["code"] == "unsupported_parameter"
    assert error_of(response)["param"].partition(".")[0] == next(iter(fields))
    assert dispatcher.requests == []


@pytest.mark.parametrize(
    ("item", "count", "param"),
    [
        ({"role": "user", "content": "x"}, 2049, "input"),
        ({"role": "user", "content": [{"type": "input_text", "text": "x"}] * 4097}, 1,
         "input[0].content"),
        ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}] * 4097}, 1,
         "input[0].summary"),
    ],
)  # fmt: skip
async def test_too_much_is_refused_i13(item: dict[str, Any], count: int, param: str) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/responses", json={**BODY, "input": [item] * count})
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert dispatcher.requests == []


async def test_stored_response_is_never_streamed() -> None:
    async with client_of(create_app(make_services())) as client:
        made = (await client.post("/v1/responses", json=BODY)).json()
        response = await client.get(f"/v1/responses/{made['id']}?stream=true")
        kept = await client.get(f"/v1/responses/{made['id']}")
    assert error_of(response)["code"] == "unsupported_parameter"
    assert kept.json() == made


async def test_conversation_cannot_grow_without_end() -> None:
    dispatcher = FakeDispatcher()
    items = [{"role": "user", "content": "x"}] * 2047
    async with client_of(create_app(make_services(dispatcher))) as client:
        first = await client.post("/v1/responses", json={**BODY, "input": items})
        follow = {**BODY, "previous_response_id": first.json()["id"]}
        response = await client.post("/v1/responses", json=follow)
    assert error_of(response)["param"] == "input"


@pytest.mark.parametrize("settings", [{"stored_responses": 0}, {"stored_responses_bytes": 10}])
async def test_server_may_store_nothing(settings: dict[str, Any]) -> None:
    async with client_of(create_app(make_services(**settings))) as client:
        made = (await client.post("/v1/responses", json=BODY)).json()
        assert (await client.get(f"/v1/responses/{made['id']}")).status_code == 404


def test_store_forgets_the_least_recently_used() -> None:
    store = ResponseStore(max_count=2, max_bytes=10**6)
    store.put("a", b"1", MESSAGES[:1])
    store.put("b", b"2", MESSAGES[:1])
    assert store.get("a") is not None
    store.put("c", b"3", MESSAGES[:1])
    assert store.get("b") is None
    assert [name for name in "abc" if store.get(name)] == ["a", "c"]


def test_store_counts_shared_messages_once_and_gives_all_back() -> None:
    store = ResponseStore(max_count=100, max_bytes=10**6)
    store.put("a", b"12345", MESSAGES[:1])
    one = store.used_bytes - 5
    for number in range(2, 9):
        store.put(f"turn{number}", b"", MESSAGES[:number])
    assert store.used_bytes == 5 + 8 * one
    assert store.delete("turn8")
    assert store.used_bytes == 5 + 7 * one
    assert not store.delete("turn8")
    for number in range(2, 8):
        store.delete(f"turn{number}")
    store.delete("a")
    assert (store.used_bytes, len(store)) == (0, 0)


def test_store_never_exceeds_its_bytes() -> None:
    store = ResponseStore(max_count=1000, max_bytes=5000)
    for number in range(300):
        store.put(str(number), b"x" * 100, (ChatMessage("user", "y" * (number % 50) * 10),))
        assert store.used_bytes <= 5000
    assert store.get("299") is not None
    store.put("huge", b"x" * 6000, ())
    assert store.get("huge") is None
    assert store.get("299") is not None
