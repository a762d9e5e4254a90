"""Real answers and events of every API are as OpenAI and Anthropic describe and type them."""

from collections.abc import Iterator
from typing import Any

import anthropic.types as of_anthropic
import httpx
import openai.types as of_openai
import pytest
from anthropic.types import beta
from openai.types import chat, responses

from tests.integration.server import STARTER, Server
from tests.sdk.known_deviations import SCHEMAS, unlisted
from tests.sdk.types_of_answers import deviations, sse_events

USER = [{"role": "user", "content": "How is the weather in Bonn? Grüße 🎈"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Köln"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA}
CUSTOM = {"type": "custom", "name": "patch"}
LETTERS = {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}"}
SPACE = {
    "type": "namespace",
    "name": "sky",
    "description": "The sky.",
    "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
}
CHAT = ("/v1/chat/completions", chat.ChatCompletion, chat.ChatCompletionChunk)
COMPLETIONS = ("/v1/completions", of_openai.Completion, of_openai.Completion)
RESPONSES = ("/v1/responses", responses.Response, responses.ResponseStreamEvent)
MESSAGES = ("/v1/messages", of_anthropic.Message, of_anthropic.RawMessageStreamEvent)
BETA = ("/v1/messages", beta.BetaMessage, beta.BetaRawMessageStreamEvent)
CASES: dict[str, tuple[tuple[str, Any, Any], dict[str, Any]]] = {
    "chat": (CHAT, {"messages": USER, "n": 2, "stop": ["zzz"]}),
    "chat_logprobs": (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 3}),
    "chat_json": (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}),
    "chat_tools": (CHAT, {
        "messages": USER, "max_tokens": 99, "tool_choice": "required",
        "tools": [{"type": "function", "function": FUNCTION}],
    }),
    "chat_custom": (CHAT, {
        "messages": USER, "max_tokens": 99, "tool_choice": "required",
        "tools": [{"type": "custom", "custom": {"name": "patch", "format": {
            "type": "grammar", "grammar": {"syntax": "regex", "definition": "[ab]{3}"}}}}],
    }),
    "chat_functions": (CHAT, {
        "messages": USER, "max_tokens": 99, "functions": [FUNCTION],
        "function_call": {"name": "weather"},
    }),
    "completions": (COMPLETIONS, {"prompt": ["Once upon", "a"], "logprobs": 2}),
    "completions_echo": (COMPLETIONS, {"prompt": "Once upon", "logprobs": 2, "echo": True}),
    "completions_nothing": (COMPLETIONS, {"prompt": "Once upon", "max_tokens": 0}),
    "completions_new": (COMPLETIONS, {"prompt": None}),
    "responses": (RESPONSES, {"input": USER}),
    "responses_logprobs": (RESPONSES, {"input": "hi", "top_logprobs": 2}),
    "responses_tools": (RESPONSES, {
        "input": USER, "max_output_tokens": 99, "tool_choice": "required", "tools": [SPACE],
    }),
    "responses_custom": (RESPONSES, {
        "input": USER, "max_output_tokens": 99, "tool_choice": "required",
        "tools": [{**CUSTOM, "format": LETTERS}],
    }),
    "responses_json": (RESPONSES, {"input": USER, "text": {"format": {
        "type": "json_schema", "name": "place", "schema": SCHEMA}}}),
    "messages": (MESSAGES, {"messages": USER, "stop_sequences": ["zzz"]}),
    "messages_warm": (MESSAGES, {"messages": USER, "max_tokens": 0}),
    "messages_tools": (MESSAGES, {
        "messages": USER, "max_tokens": 99, "tool_choice": {"type": "any"},
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
    }),
    "beta": (BETA, {"messages": USER, "thread": {"type": "create"}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as one:
        yield one


@pytest.mark.parametrize("name", CASES)
def test_answers_and_events_are_as_typed_and_described(http: httpx.Client, name: str) -> None:
    (path, answer, event), fields = CASES[name]
    limit = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    body = {"model": STARTER, limit: 12, "temperature": 0, **fields}
    whole = http.post(path, json=body)
    assert whole.status_code == 200, whole.text
    assert deviations(whole.json(), answer) == []
    company, whole_schema, event_schema = SCHEMAS[name.partition("_")[0]]
    assert unlisted(company, whole_schema, whole.json()) == []

    streamed = http.post(path, json={**body, "stream": True})
    assert streamed.status_code == 200, streamed.text
    events = sse_events(streamed.text)
    assert events
    found = [
        deviation
        for event_name, data in events
        if event_name != "ping"
        for deviation in (*deviations(data, event), *unlisted(company, event_schema, data))
    ]
    assert found == []


def test_calls_of_custom_tools_are_their_grammars_text(http: httpx.Client) -> None:
    for name in ("chat_custom", "responses_custom"):
        (path, _, _), fields = CASES[name]
        answer = http.post(path, json={"model": STARTER, **fields}).json()
        if path == CHAT[0]:
            (call,) = answer["choices"][0]["message"]["tool_calls"]
            text = call["custom"]["input"]
        else:
            (text,) = (one["input"] for one in answer["output"] if "input" in one)
        assert len(text) == 3
        assert set(text) <= {"a", "b"}


def test_one_of_several_completions_is_returned(http: httpx.Client) -> None:
    body = {"model": STARTER, "prompt": "Once upon", "max_tokens": 6, "best_of": 4}
    answer = http.post("/v1/completions", json=body).json()
    (choice,) = answer["choices"]
    assert choice["logprobs"] is None
    assert 6 < answer["usage"]["completion_tokens"] <= 24


def test_embeddings_and_models_have_the_types_of_the_sdks(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert deviations(listed, list[of_openai.Model]) == []
    assert [found for one in listed for found in unlisted("openai", "Model", one)] == []
    encoder = next(one["id"] for one in listed if "embedding" in one["capabilities"])
    answer = http.post("/v1/embeddings", json={"model": encoder, "input": ["a", "b"]})
    assert deviations(answer.json(), of_openai.CreateEmbeddingResponse) == []
    assert unlisted("openai", "CreateEmbeddingResponse", answer.json()) == []
    page = http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert deviations(page["data"], list[of_anthropic.ModelInfo]) == []
    assert unlisted("anthropic", "ListResponse_ModelInfo_", page) == []
