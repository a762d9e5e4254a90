"""Scripts of models, and the requests that make every form of answer and event of every API."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anthropic.types as of_anthropic
import httpx
import openai.types as of_openai
from anthropic.types import beta
from openai.types import chat, responses

from core.types import (
    Capability,
    Finished,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from router.services import Services
from tests.fakes import EMBEDDING_MODEL, FakeDispatcher, finished, make_services, make_view

TOKEN = TokenLogprob(1, b"x", -0.5, (TokenLogprob(2, b"\xff", -1.0), TokenLogprob(3, b"z", -2.0)))
TEXT = (TextDelta("Hel", (1,), (TOKEN,)), TextDelta("lo", (1,), (TOKEN, TOKEN)), finished())
ECHO = (
    PrefillProgress(2, 2, logprobs=(TokenLogprob(1, b"h", math.nan), TOKEN)),
    TextDelta("hx"),
    *TEXT,
)
CUT = (TextDelta("Hel"), finished("length"))
EMPTY = (finished(),)
CALLS = (
    PrefillProgress(5, 20),
    ReasoningDelta("I should "),
    ReasoningDelta("look."),
    TextDelta("Let me see.", (1,), (TOKEN,)),
    ToolCallDelta(0, "call_1", "weather"),
    ToolCallDelta(0, arguments='{"city": '),
    ToolCallDelta(0, arguments='"Köln"}'),
    ToolCallDelta(1, "call_2", "files__read", "{}"),
    ToolCallDelta(2, "call_3", "patch", '{"input": "a\\nb"}'),
    Finished("tool_calls", Usage(20, 9, 5, 3)),
)
CALL_CUT = (
    ReasoningDelta("hm"),
    ToolCallDelta(0, "call_1", "weather", '{"ci'),
    Finished("length", Usage(20, 9, 5, 3)),
)
SCRIPTS = {
    "text": TEXT,
    "echo": ECHO,
    "cut": CUT,
    "empty": EMPTY,
    "calls": CALLS,
    "call_cut": CALL_CUT,
}

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("weather", "files__read", "patch")
]
FORMAT = {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}
FREEFORM = {"type": "custom", "name": "patch", "description": "d"}
RESPONSE_TOOLS = [
    {"type": "function", "name": "weather", "parameters": SCHEMA},
    {"type": "namespace", "name": "files", "description": "d", "tools": [
        {"type": "function", "name": "read", "parameters": SCHEMA, "strict": True},
        {"type": "custom", "name": "write"},
    ]},
    {**FREEFORM, "format": {"type": "grammar", "syntax": "regex", "definition": "[a-z\n]+"}},
    {"type": "web_search"},
]  # fmt: skip
LISTED = {
    "type": "allowed_tools",
    "mode": "auto",
    "tools": [{"type": "function", "name": "weather"}],
}
MESSAGE_TOOLS = [
    {"name": name, "input_schema": SCHEMA} for name in ("weather", "files__read", "patch")
]
PNG = "data:image/png;base64,AAAA"
HISTORY: list[Any] = [
    "hi",
    {"role": "user", "content": [{"type": "input_image", "image_url": PNG, "detail": "low"}]},
    {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
        {"type": "output_text", "text": "x", "annotations": []},
        {"type": "refusal", "refusal": "no"},
    ]},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}]},
    {"type": "function_call", "call_id": "c1", "name": "read", "namespace": "files",
     "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": [
        {"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": PNG},
    ]},
    {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "a"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
    {"role": "assistant", "content": "y"},
    {"role": "developer", "content": "Be brief."},
]  # fmt: skip


@dataclass(frozen=True)
class Api:
    """An endpoint that generates, the smallest request for it, and its types."""

    path: str
    body: dict[str, Any]
    answer: Any
    event: Any


USER = [{"role": "user", "content": "hi"}]
APIS = {
    "chat": Api(
        "/v1/chat/completions", {"messages": USER}, chat.ChatCompletion, chat.ChatCompletionChunk
    ),
    "completions": Api(
        "/v1/completions", {"prompt": "hi"}, of_openai.Completion, of_openai.Completion
    ),
    "responses": Api(
        "/v1/responses", {"input": "hi"}, responses.Response, responses.ResponseStreamEvent
    ),
    "messages": Api(
        "/v1/messages",
        {"messages": USER, "max_tokens": 99},
        of_anthropic.Message,
        of_anthropic.RawMessageStreamEvent,
    ),
    "beta": Api(
        "/v1/messages",
        {"messages": USER, "max_tokens": 99},
        beta.BetaMessage,
        beta.BetaRawMessageStreamEvent,
    ),
}
OPTIONS: dict[str, Sequence[dict[str, Any]]] = {
    "chat": (
        {},
        {"tools": CHAT_TOOLS},
        {"tools": [CHAT_TOOLS[0], {"type": "custom", "custom": {"name": "patch"}}]},
        {"functions": [{"name": "weather"}]},
        {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"timings_per_token": True, "service_tier": "flex", "metadata": {"a": "b"}},
        {"response_format": {"type": "json_object"}, "tools": CHAT_TOOLS},
    ),
    "completions": (
        {},
        {"logprobs": 2, "n": 2},
        {"echo": True, "logprobs": 2},
        {"timings_per_token": True},
    ),
    "responses": (
        {},
        {"tools": RESPONSE_TOOLS, "tool_choice": LISTED, "instructions": "Be brief."},
        {"tools": RESPONSE_TOOLS, "tool_choice": {"type": "custom", "name": "patch"}},
        {"tools": RESPONSE_TOOLS, "tool_choice": {"type": "function", "name": "weather"}},
        {"tools": [{**FREEFORM, "format": {"type": "text"}}], "parallel_tool_calls": False},
        {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        {"include": ["reasoning.encrypted_content"], "store": False, "text": {"format": FORMAT}},
        {"text": {"format": {"type": "json_object"}, "verbosity": "low"}, "truncation": "auto"},
        {"reasoning": {"effort": "max", "summary": "detailed"}, "service_tier": "flex"},
        {"metadata": {"a": "b"}, "user": "u", "max_tool_calls": 3, "temperature": 0, "top_p": 1},
        {"input": [{"role": "user", "content": HISTORY[0]}, *HISTORY[1:], *USER]},
    ),
    "messages": (
        {},
        {"tools": MESSAGE_TOOLS, "tool_choice": {"type": "any"}},
        {"thinking": {"type": "adaptive", "display": "omitted"}, "stop_sequences": ["x"]},
        {"max_tokens": 0, "system": [{"type": "text", "text": "Be brief."}]},
    ),
    "beta": (
        {"thread": {"type": "create"}, "tools": MESSAGE_TOOLS},
        {"output_format": {"type": "json_schema", "schema": SCHEMA}},
        {"compaction": {"type": "summarize"}, "tools": MESSAGE_TOOLS},
    ),
}  # fmt: skip


def services_of(dispatcher: FakeDispatcher) -> Services:
    """Return services with the models "tiny", which reasons, and "mini", which embeds."""
    chatting = make_view(
        capabilities=frozenset({Capability.CHAT, Capability.COMPLETION, Capability.REASONING})
    )
    embedding = make_view(EMBEDDING_MODEL, capabilities=frozenset({Capability.EMBEDDING}))
    return make_services(dispatcher, views=(chatting, embedding))


async def post(client: httpx.AsyncClient, api: Api, body: dict[str, Any]) -> httpx.Response:
    """Return the answer to the smallest request with the fields of `body`; it must be 200."""
    response = await client.post(api.path, json={"model": "tiny", **api.body, **body})
    assert response.status_code == 200, response.text
    return response
