"""Anthropic's Messages API on the wire: what is taken, what is refused, and the stream's bytes."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from core.errors import UnsupportedCapability
from core.types import (
    Capability,
    ChatMessage,
    ChatPrompt,
    Finished,
    JsonOutput,
    PrefillProgress,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from router.app import create_app
from router.context import Pacing
from router.requests.body import validate_request
from router.v1.messages.prompt import to_messages_prompt
from router.v1.messages.request import MessagesRequest
from tests.fakes import EMBEDDING_MODEL, FakeDispatcher, finished, make_services, make_view
from tests.live_server import client_of, connection, post_bytes, serving

BODY: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hi"}],
}
TOOL = {"name": "read", "input_schema": {"type": "object"}}
AWKWARD = 'a\nb\r\n\u2028 "q" \\ 😀 \0 event: error\ndata: x\n\n'


ON = {"enable_thinking": True, "thinking": True}
OFF = {"enable_thinking": False, "thinking": False}
_CHUNK_SIZE = re.compile(rb"[0-9a-f]+")


def prompt_of(**fields: Any) -> ChatPrompt:
    return to_messages_prompt(validate_request({**BODY, **fields}, MessagesRequest))


async def post(
    dispatcher: FakeDispatcher, path: str = "/v1/messages", **fields: Any
) -> httpx.Response:
    async with client_of(create_app(make_services(dispatcher))) as client:
        return await client.post(path, json={**BODY, **fields})


def user(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


def assistant(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": list(blocks)}, {"role": "user", "content": "on"}]


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("Be brief.", "Be brief."),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "a"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ("x-anthropic-billing-header: cc_version=2.1; cch=9f2b3;", None),
        ("x-anthropic-billing-header: cch=1;\nX-Anthropic-Other: 2\nBe brief.", "Be brief."),
        (
            [
                {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
                {"type": "text", "text": "You are."},
            ],
            "You are.",
        ),
        ("Send:\nx-anthropic-beta: z", "Send:\nx-anthropic-beta: z"),
        (None, None),
    ],
)  # fmt: skip
def test_system_loses_its_volatile_first_lines_only(system: Any, expected: str | None) -> None:
    first = prompt_of(system=system).messages[0]
    assert (
        first == ChatMessage("user", "hi")
        if expected is None
        else (first == ChatMessage("system", expected))
    )


def test_prompt_is_the_same_whatever_the_billing_header() -> None:
    prompts = [
        prompt_of(system=f"x-anthropic-billing-header: cch={number};\nBe brief.")
        for number in range(2)
    ]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None)),
        ({"type": "auto"}, ("auto", None)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", False)),
        ({"type": "any", "disable_parallel_tool_use": False}, ("required", True)),
        ({"type": "tool", "name": "read"}, (("function", "read"), None)),
        ({"type": "none"}, ("none", None)),
    ],
)
def test_tool_choice_has_its_meaning(choice: Any, expected: Any) -> None:
    prompt = prompt_of(tools=[TOOL], tool_choice=choice)
    assert (prompt.tool_choice, prompt.parallel_tool_calls) == expected


@pytest.mark.parametrize(
    ("fields", "variables", "budget"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 50}}, ON, 50),
        ({"thinking": {"type": "disabled"}}, OFF, None),
        ({"thinking": {"type": "adaptive", "display": "updates"}}, {}, None),
        ({"thinking": {"type": "between_tools"}}, OFF, None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, OFF, None),
        (
            {"output_config": {"effort": "max"}},
            {**ON, "reasoning_effort": "high"},
            None,
        ),
    ],
)
def test_thinking_becomes_the_prompts_fields(
    fields: Any, variables: dict[str, Any], budget: int | None
) -> None:
    prompt = prompt_of(**fields)
    assert (prompt.template_kwargs, prompt.reasoning_tokens) == (variables, budget)


@pytest.mark.parametrize(("more", "expected"), [((Capability.REASONING,), 50), ((), None)])
async def test_model_that_does_not_reason_needs_no_bound(more: Any, expected: int | None) -> None:
    view = make_view(capabilities=frozenset({Capability.CHAT, *more}))
    dispatcher = FakeDispatcher()
    body = {**BODY, "thinking": {"type": "enabled", "budget_tokens": 50}}
    async with client_of(create_app(make_services(dispatcher, views=[view]))) as client:
        assert (await client.post("/v1/messages", json=body)).status_code == 200
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.reasoning_tokens == expected


async def test_request_reaches_the_engine_whole() -> None:
    dispatcher = FakeDispatcher()
    schema = {"type": "object"}
    response = await post(
        dispatcher,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        stop_sequences=["END"],
        metadata={"user_id": "me"},
        service_tier="auto",
        output_config={"format": {"type": "json_schema", "schema": schema}},
        context_management={"edits": []},
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi", "new": 1}]}],
    )
    (request,) = dispatcher.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (request.max_tokens, request.stop) == (100, ("END",))
    assert request.output == JsonOutput(schema)
    assert response.headers["x-impetus-ignored"] == "context_management, messages.content.new"
    assert response.headers["x-impetus-timing"].startswith("queued;dur=")


async def test_fields_for_servers_of_anthropic_only_are_ignored_and_named() -> None:
    fields: dict[str, Any] = {
        "container": "c",
        "mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}],
        "speed": "fast",
        "fallbacks": "default",
    }
    response = await post(FakeDispatcher(), **fields)
    assert response.status_code == 200
    assert response.headers["x-impetus-ignored"] == ", ".join(fields)


async def test_format_is_bound_under_its_first_name_too() -> None:
    dispatcher = FakeDispatcher()
    schema = {"type": "object"}
    await post(dispatcher, output_format={"type": "json_schema", "schema": schema})
    assert dispatcher.requests[0].output == JsonOutput(schema)


@pytest.mark.parametrize("streams", [True, False])
async def test_no_tokens_compute_the_prompt_and_answer_nothing(*, streams: bool) -> None:
    dispatcher = FakeDispatcher(TextDelta("Hello"), Finished("stop", Usage(7, 1, 3), stop="END"))
    response = await post(dispatcher, max_tokens=0, stream=streams, stop_sequences=["END"])
    assert response.status_code == 200
    assert dispatcher.requests[0].max_tokens == 1
    assert "Hello" not in response.text
    assert "content_block" not in response.text
    assert '"stop_reason":"max_tokens","stop_sequence":null' in response.text
    assert '"cache_read_input_tokens":3,"output_tokens":0' in response.text
    if not streams:
        assert response.json()["content"] == []


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (finished(), ("end_turn", None)),
        (finished("length"), ("max_tokens", None)),
        (finished("tool_calls"), ("tool_use", None)),
        (Finished("stop", Usage(7, 2), stop="END"), ("stop_sequence", "END")),
        (Finished("stop", Usage(7, 2), stop="\nUser:"), ("end_turn", None)),
        (Finished("tool_calls", Usage(7, 2), stop="END"), ("tool_use", None)),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
async def test_stop_reason_tells_why(end: Finished, expected: Any, *, streams: bool) -> None:
    response = await post(
        FakeDispatcher(TextDelta("x"), end), stop_sequences=["END"], stream=streams
    )
    reason, sequence = (f'"{text}"' if text else "null" for text in expected)
    assert f'"stop_reason":{reason},"stop_sequence":{sequence}' in response.text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": 1, "path": "/tm', {"a": 1, "path": "/tm"}),
        ("not json", {"arguments": "not json"}),
        ("[1]", {"arguments": "[1]"}),
    ],
)
async def test_whole_tool_input_is_an_object_whatever_the_model_wrote_i10(
    arguments: str, expected: Any
) -> None:
    call = ToolCallDelta(0, "c1", "read", arguments)
    response = await post(FakeDispatcher(call, finished("length")), tools=[TOOL])
    (block,) = response.json()["content"]
    assert block == {
        "type": "tool_use", "id": "c1", "name": "read", "input": expected,
        "caller": {"type": "direct"},
    }  # fmt: skip


async def test_fields_without_a_value_are_null_and_are_not_named_when_they_come_back() -> None:
    answers = FakeDispatcher(
        TextDelta("Hel"), ToolCallDelta(0, "c1", "read", "{}"), finished("tool_calls")
    )
    answer = (await post(answers, tools=[TOOL])).json()
    assert answer["container"] is None is answer["stop_details"]
    nulls = {name for name, value in answer["usage"].items() if value is None}
    assert nulls == {"cache_creation", "inference_geo", "server_tool_use", "service_tier"}
    assert answer["content"][0] == {"type": "text", "text": "Hel", "citations": None}

    result = {"type": "tool_result", "tool_use_id": "c1", "content": "x"}
    said = {"role": "assistant", "content": answer["content"]}
    history = [*BODY["messages"], said, *user(result)]
    response = await post(FakeDispatcher(finished()), messages=history, tools=[TOOL])
    assert response.status_code == 200, response.text
    assert "x-impetus-ignored" not in response.headers


@pytest.mark.parametrize(
    ("fields", "param", "kind"),
    [
        ({"max_tokens": None}, "max_tokens", "valid"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "user"),
        ({"messages": user({"type": "image", "source": {}})}, "messages[0].content[0]", "'image'"),
        ({"messages": user({"type": "document"})}, "messages[0].content[0]", "'document'"),
        ({"messages": user({"type": "tool_use", "id": "a", "name": "b", "input": {}})},
         "messages[0].content[0]", "'tool_use'"),
        ({"messages": user({"type": "text"})}, "messages[0].content[0].text", "required"),
        ({"messages": user({"type": "tool_result"})}, "messages[0].content[0].tool_use_id", "req"),
        ({"messages": assistant({"type": "tool_use", "name": "b", "input": {}})},
         "messages[0].content[0].id", "required"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "required"),
        ({"tools": [{"type": "custom", "input_schema": {}}]}, "tools[0].name", "required"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs at least one tool"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "write"}},
         "tool_choice", "'write'"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "two tools"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "required"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens", "less"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens", "only"),
        ({"compaction": {"type": "forget"}}, "compaction.type", "summarize"),
        ({"output_format": {"type": "json_schema", "schema": {}},
          "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
         "output_format", "differs"),
        ({"stop_sequences": [""]}, "stop_sequences", "1 to 256"),
        ({"model": EMBEDDING_MODEL}, "", "cannot be used for chat"),
    ],
)  # fmt: skip
async def test_bad_request_is_refused_by_name(
    fields: dict[str, Any], param: str, kind: str
) -> None:
    dispatcher = FakeDispatcher()
    response = await post(dispatcher, **fields)
    body = response.json()
    assert response.status_code == 400
    assert set(body) == {"type", "error", "request_id"}
    assert body["error"]["type"] == "invalid_request_error"
    assert param in body["error"]["message"]
    assert kind in body["error"]["message"]
    assert dispatcher.requests == []


@pytest.mark.parametrize(
    "fields", [{"chat_template": "{{ evil }}"}, {"chat_template_kwargs": {"tokenize": True}}]
)
async def test_template_of_the_client_is_refused_i7(fields: dict[str, Any]) -> None:
    dispatcher = FakeDispatcher()
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        response = await post(dispatcher, path, **fields)
        assert response.status_code == 400
        assert next(iter(fields)) in response.json()["error"]["message"]
    assert dispatcher.requests == []
    assert dispatcher.counted == []


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": [{"role": "user", "content": "x"}] * 2049}, "messages"),
        ({"messages": user(*[{"type": "text", "text": "x"}] * 4097)}, "messages[0].content"),
        ({"system": [{"type": "text", "text": "x"}] * 4097}, "system"),
        ({"tools": [TOOL] * 513}, "tools"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences"),
        ({"temperature": 1e999}, ""),
    ],
)
async def test_too_much_is_refused_i13(fields: dict[str, Any], name: str) -> None:
    dispatcher = FakeDispatcher()
    body = json.dumps({**BODY, **fields})
    async with client_of(create_app(make_services(dispatcher))) as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/messages", content=body, headers=headers)
    assert response.status_code == 400
    assert name in response.json()["error"]["message"]
    assert dispatcher.requests == []


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("POST", "/v1/messages/nothing", 404, "not_found_error"),
        ("POST", "/v1/messages", 415, "invalid_request_error"),
    ],
)
async def test_every_error_under_the_path_has_the_envelope(
    method: str, path: str, status: int, kind: str
) -> None:
    async with client_of(create_app(make_services())) as client:
        content_type = "text/plain" if status == 415 else "application/json"
        headers = {"content-type": content_type, "anthropic-version": "2023-06-01"}
        response = await client.request(method, path, headers=headers, content=b"{}")
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["request_id"] == response.headers["x-request-id"]


async def test_count_of_a_model_that_cannot_count_is_an_error() -> None:
    dispatcher = FakeDispatcher()
    dispatcher.count_error = UnsupportedCapability("The model x cannot count tokens.")
    response = await post(dispatcher, "/v1/messages/count_tokens?beta=true")
    assert (response.status_code, response.json()["error"]["type"]) == (
        400,
        "invalid_request_error",
    )
    assert dispatcher.deadlines == [make_services().settings.request_timeout_s]


async def test_stream_pings_and_tells_prefill_before_the_first_token_s2() -> None:
    gate = asyncio.Event()
    pacing = Pacing(header_wait_s=0.01, early_keep_alive_s=0.01)
    script = (PrefillProgress(512, 4096), gate, TextDelta(AWKWARD), TextDelta("x"), finished())
    async with (
        serving(create_app(make_services(FakeDispatcher(*script)), pacing=pacing)) as port,
        connection(port) as (reader, writer),
    ):
        writer.write(post_bytes("/v1/messages", {**BODY, "stream": True}))
        head = await asyncio.wait_for(reader.readuntil(b"event: ping\n"), 30)
        gate.set()
        rest = await asyncio.wait_for(reader.readuntil(b'{"type":"message_stop"}'), 30)
    assert head.startswith(b"HTTP/1.1 200")
    assert head.index(b"event: message_start\n") < head.index(b": prefill 512/4096\n\n")
    assert b'"input_tokens":4096' in head
    whole = b"".join(line for line in rest.split(b"\r\n") if not _CHUNK_SIZE.fullmatch(line))
    lines = whole.decode("ascii").split("\n")
    assert {line.partition(" ")[0] for line in lines if line} == {"event:", "data:"}
    deltas = [line for line in lines if '"text_delta"' in line]
    assert json.loads(deltas[0].removeprefix("data: "))["delta"]["text"] == AWKWARD


async def test_stream_starts_with_the_tokens_of_a_short_prompt() -> None:
    script = (PrefillProgress(42, 42), TextDelta("x"), finished(prompt=42, cached=0))
    response = await post(FakeDispatcher(*script), stream=True)
    start = json.loads(response.text.partition("data: ")[2].partition("\n")[0])
    assert start["message"]["usage"]["input_tokens"] == 42
    assert ": prefill" not in response.text


@pytest.mark.parametrize(
    ("last", "continues", "count"),
    [
        ("y", True, 2),
        ([{"type": "text", "text": "y"}], True, 2),
        ([{"type": "thinking", "thinking": "y", "signature": "s"}], True, 2),
        ("", False, 1),
        ([{"type": "tool_use", "id": "a", "name": "b", "input": {}}], False, 2),
    ],
)
def test_last_message_of_the_assistant_is_continued(last: Any, continues: bool, count: int) -> None:
    prompt = prompt_of(messages=[*BODY["messages"], {"role": "assistant", "content": last}])
    assert (prompt.continues_answer, len(prompt.messages)) == (continues, count)
    assert not prompt_of().continues_answer
