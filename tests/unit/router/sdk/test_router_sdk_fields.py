"""Every field and every value that the SDKs' request types know is honoured, named or refused.

The types are read from the installed SDKs: a field or a value that a new version adds is tried.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import input_token_count_params, response_create_params

from router.app import create_app
from router.requests.fields import RequestBody
from router.requests.other_fields import ALREADY_SO
from router.requests.refused_values import REASONS
from router.v1.chat.request import ChatRequest
from router.v1.completions import CompletionRequest
from router.v1.embeddings import EmbeddingRequest
from router.v1.messages.request import MessagesRequest
from router.v1.responses.request import ResponsesRequest
from scripts.fields_table import all_fields
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of
from tests.sdk.samples_of_requests import TEXT, fields, samples


@dataclass(frozen=True)
class Api:
    """An endpoint, the SDK's type of its requests, its model here, and the smallest request."""

    path: str
    documented: Any
    model: type[RequestBody]
    base: dict[str, Any]


USER: Any = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": USER}
CLAUDE = {**CHAT, "max_tokens": 9}
INPUT = {"model": "tiny", "input": "hi"}
APIS = {
    "chat": Api(
        "/v1/chat/completions", chat_create_params.CompletionCreateParamsBase, ChatRequest, CHAT
    ),
    "completions": Api(
        "/v1/completions",
        completion_create_params.CompletionCreateParamsBase,
        CompletionRequest,
        {"model": "tiny", "prompt": "hi"},
    ),
    "embeddings": Api(
        "/v1/embeddings",
        embedding_create_params.EmbeddingCreateParams,
        EmbeddingRequest,
        {"model": "mini", "input": "hi"},
    ),
    "responses": Api(
        "/v1/responses", response_create_params.ResponseCreateParamsBase, ResponsesRequest, INPUT
    ),
    "responses_count": Api(
        "/v1/responses/input_tokens",
        input_token_count_params.InputTokenCountParams,
        ResponsesRequest,
        INPUT,
    ),
    "messages": Api(
        "/v1/messages", message_create_params.MessageCreateParamsBase, MessagesRequest, CLAUDE
    ),
    "beta": Api(
        "/v1/messages", beta_create_params.MessageCreateParamsBase, MessagesRequest, CLAUDE
    ),
    "count": Api(
        "/v1/messages/count_tokens",
        message_count_tokens_params.MessageCountTokensParams,
        MessagesRequest,
        CHAT,
    ),
    "beta_count": Api(
        "/v1/messages/count_tokens",
        beta_count_tokens_params.MessageCountTokensParams,
        MessagesRequest,
        CHAT,
    ),
}
# Fields in which every field of every conversation's part is tried once; counts read the same.
BIG = ("messages", "tools", "input")
CASES = [
    pytest.param(name, field, id=f"{name}-{field}")
    for name, api in APIS.items()
    for field in fields(api.documented)
    if field != "model"
    and not (name in ("count", "beta_count", "responses_count") and field in BIG)
]
# What is stored elsewhere: the samples name nothing that this server knows.
UNKNOWN_ID = "previous_response_id"
# In words, as the reference has them: what is refused within fields that are read.
REFUSED_VALUES = (
    "such tools cannot run here",
    "required for the type json_schema",
    "has no tokens for filling in the middle",
    "send the item itself instead of a reference to it",
    "no conversation is kept under",
    # The samples of a tool among those allowed are objects of any form.
    "its tools must be objects with a type",
    "needs at least one tool that may be called",
)


@pytest.fixture
async def client() -> AsyncGenerator[httpx.AsyncClient, None]:
    async with client_of(create_app(make_services(FakeDispatcher()))) as one:
        yield one


def request_for(name: str, field: str, value: Any) -> dict[str, Any]:
    """Return a request in which the value has the sense that it has in the API."""
    body = {**APIS[name].base, field: value}
    match field:
        case "messages":
            return {**body, field: [*value, *USER]}
        case "input" if name == "responses" and isinstance(value, list):
            return {**body, field: [*value, *USER]}
        case "stream_options":
            return {**body, "stream": True}
        case "top_logprobs" if name == "chat":
            return {**body, "logprobs": True}
        case "tool_choice":
            return {**body, **tools_for(name, value)}
        case "function_call":
            return {**body, "functions": [{"name": TEXT}]}
    return body


def tools_for(name: str, choice: Any) -> dict[str, Any]:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if name == "chat":
        own = "custom" if kind == "custom" else "function"
        return {"tools": [{"type": own, own: {"name": TEXT}}]}
    if name.startswith("responses"):
        return {"tools": [{"type": "custom" if kind == "custom" else "function", "name": TEXT}]}
    return {"tools": [{"name": TEXT, "input_schema": {"type": "object"}}]}


def is_listed_refusal(param: str | None, message: str) -> bool:
    """Whether the reference lists a refusal; Anthropic's errors have no `param`."""
    listed = (*REASONS.values(), *REFUSED_VALUES)
    return param == UNKNOWN_ID or any(words in message for words in listed)


@pytest.mark.parametrize(("name", "field"), CASES)
async def test_documented_values_are_honoured_named_or_refused_with_a_reason(
    client: httpx.AsyncClient, name: str, field: str
) -> None:
    api = APIS[name]
    is_unread = field not in api.model.model_fields and field not in api.model.harmless
    tried = 0
    for value in samples(fields(api.documented)[field]):
        tried += 1
        response = await client.post(api.path, json=request_for(name, field, value))
        if response.status_code == 200:
            named = response.headers.get("x-impetus-ignored", "").split(", ")
            assert not is_unread or field in named or value in _off(api.model, field), value
        else:
            error = response.json()["error"]
            assert is_listed_refusal(error.get("param"), error["message"]), (value, error)
    assert tried


def _off(model: type[RequestBody], field: str) -> tuple[Any, ...]:
    return (None, *(model.off_values(field) or ()), *ALREADY_SO.get(field, ()))


@pytest.mark.parametrize("name", APIS)
def test_every_documented_field_is_in_the_table(name: str) -> None:
    assert set(fields(APIS[name].documented)) <= set(all_fields())


@pytest.mark.parametrize("field", REASONS)
async def test_refused_fields_are_refused_with_their_reason(
    client: httpx.AsyncClient, field: str
) -> None:
    found = 0
    for api in APIS.values():
        if field not in fields(api.documented) or field in api.model.model_fields:
            continue
        (*_, value) = (one for one in samples(fields(api.documented)[field]) if one is not None)
        response = await client.post(api.path, json={**api.base, field: value})
        assert response.status_code == 400, value
        assert f"{field} is not supported: {REASONS[field]}" in response.json()["error"]["message"]
        found += 1
    assert found
