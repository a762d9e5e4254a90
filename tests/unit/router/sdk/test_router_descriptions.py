"""Every answer and every event is as OpenAI and Anthropic describe them, but for what is listed."""

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias

import httpx
import pytest

from core.errors import ContextLengthExceeded, EngineFailed, QueueFull
from core.types import ReasoningDelta, TextDelta
from tests.fakes import FakeDispatcher
from tests.sdk.descriptions import CHECKSUMS, Description, description
from tests.sdk.known_deviations import KNOWN, SCHEMAS
from tests.sdk.scripted_answers import (
    APIS,
    CALLS,
    HISTORY,
    MESSAGE_TOOLS,
    OPTIONS,
    RESPONSE_TOOLS,
    SCRIPTS,
    USER,
    post,
)
from tests.sdk.types_of_answers import sse_events

# A schema, and a value that it describes.
Answers: TypeAlias = AsyncIterator[tuple[str, Any]]
ERRORS = (EngineFailed("It died."), QueueFull("Full."), ContextLengthExceeded.of(9, 5))


async def check(company: str, answers: Answers) -> None:
    """Compare the deviations of `answers` with those listed for their schemas."""
    found: set[str] = set()
    schemas: set[str] = set()
    async for schema, value in answers:
        schemas.add(schema)
        found.update(description(company).deviations(value, schema))
    assert found == {one for one in KNOWN if _schema(one) in schemas}


def _schema(deviation: str) -> str:
    named = re.match(r"\w+", deviation)
    assert named is not None
    return named[0]


async def streamed(client: httpx.AsyncClient, name: str, option: dict[str, Any]) -> Answers:
    """Yield the events of a stream with their schema; an error is as in an answer."""
    _, _, schema = SCHEMAS[name]
    text = (await post(client, APIS[name], {**option, "stream": True})).text
    for event_name, event in sse_events(text):
        if event_name == "ping":
            continue
        is_error = "error" in event if event_name is None else event_name == "error"
        # The Responses API has an event of its own for it.
        yield ("ErrorResponse" if is_error and name != "responses" else schema), event


async def answers_of(client: httpx.AsyncClient, dispatcher: FakeDispatcher, name: str) -> Answers:
    """Yield the answers and events of an API for every request and every script."""
    _, schema, _ = SCHEMAS[name]
    for option in OPTIONS[name]:
        for dispatcher.script in SCRIPTS.values():
            yield schema, (await post(client, APIS[name], option)).json()
            with_usage: Sequence[dict[str, Any]] = (
                ({}, {"stream_options": {"include_usage": True}})
                if name in ("chat", "completions")
                else ({},)
            )
            for more in with_usage:
                async for found in streamed(client, name, {**option, **more}):
                    yield found
    for error in ERRORS:
        dispatcher.script = (error,)
        response = await client.post(APIS[name].path, json={"model": "tiny", **APIS[name].body})
        assert response.status_code >= 400
        yield "ErrorResponse", response.json()
        dispatcher.script = (ReasoningDelta("hm"), TextDelta("x"), error)
        async for found in streamed(client, name, {}):
            yield found


@pytest.mark.parametrize("name", ["chat", "completions", "messages", "beta"])
async def test_answers_and_events_are_as_described(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher, name: str
) -> None:
    await check(SCHEMAS[name][0], answers_of(client, dispatcher, name))


async def test_responses_stored_and_listed_are_as_described(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    async def answers() -> Answers:
        async for found in answers_of(client, dispatcher, "responses"):
            yield found
        dispatcher.script = CALLS
        body = {"tools": RESPONSE_TOOLS, "input": [*USER, *HISTORY[1:], *USER]}
        first = (await post(client, APIS["responses"], body)).json()
        following = {"previous_response_id": first["id"]}
        second = (await post(client, APIS["responses"], following)).json()
        path = f"/v1/responses/{second['id']}"
        yield "Response", (await client.get(path)).json()
        page = (await client.get(f"{path}/input_items", params={"limit": 100})).json()
        assert {item["type"] for item in page["data"]} >= {"reasoning", "function_call"}
        yield "ResponseItemList", page
        asked: Any = {"model": "tiny", "input": "hi", "tools": RESPONSE_TOOLS}
        yield "TokenCountsResource", (await client.post(
            "/v1/responses/input_tokens", json=asked)).json()  # fmt: skip
        assert (await client.delete(path)).status_code == 200
        yield "ErrorResponse", (await client.get(path)).json()

    await check("openai", answers())


async def test_embeddings_and_models_are_as_openai_describes_them(
    client: httpx.AsyncClient,
) -> None:
    async def answers() -> Answers:
        for inputs in ("a", ["a", "b"], [1, 2]):
            body = {"model": "mini", "input": inputs}
            yield "CreateEmbeddingResponse", (await client.post("/v1/embeddings", json=body)).json()
        yield "ListModelsResponse", (await client.get("/v1/models")).json()
        yield "Model", (await client.get("/v1/models/tiny")).json()
        for path in ("/v1/models/none", "/v1/nothing"):
            yield "ErrorResponse", (await client.get(path)).json()

    await check("openai", answers())


@pytest.mark.parametrize("beta", ["", "Beta"])
async def test_models_and_counts_are_as_anthropic_describes_them(
    client: httpx.AsyncClient, beta: str
) -> None:
    async def answers() -> Answers:
        headers = {"anthropic-version": "2023-06-01"}
        listed = await client.get("/v1/models", headers=headers)
        yield f"{beta}ListResponse_ModelInfo_", listed.json()
        one = await client.get("/v1/models/tiny", headers=headers)
        yield f"{beta}ModelInfo", one.json()
        body = {"model": "tiny", "messages": USER, "tools": MESSAGE_TOOLS}
        counted = await client.post("/v1/messages/count_tokens", json=body)
        yield f"{beta}CountMessageTokensResponse", counted.json()
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            refused = await client.post(path, json={"messages": 5})
            assert refused.status_code == 400
            yield f"{beta}ErrorResponse", refused.json()

    await check("anthropic", answers())


async def test_comparison_finds_each_kind_of_deviation(client: httpx.AsyncClient) -> None:
    answer = (await post(client, APIS["responses"], {})).json()
    (item,) = answer["output"]
    broken: list[tuple[dict[str, Any], str]] = [
        ({"id": 5}, ".id: int is not of type string"),
        ({"object": "answer"}, ".object: 'answer' is not one of"),
        ({"extra": 1}, ": 'extra' is not described"),
        ({"output": [{**item, "type": "text"}]}, ".output[]: no object has the type 'text'"),
        ({"output": [{**item, "role": "user"}]}, ".output[].role: 'user' is not one of"),
        ({"output": [{**item, "x": 1}]}, ".output[]: 'x' is not described"),
        ({"output": item}, ".output: dict is not of type array"),
        ({"metadata": {"a": 1}}, ".metadata.a: int is not of type string"),
        ({"error": {"code": "server_error"}}, ".error: 'message' is a required property"),
    ]
    described = description("openai")
    usual = set(described.deviations(answer, "Response"))
    for change, told in broken:
        (found,) = set(described.deviations({**answer, **change}, "Response")) - usual
        assert found.startswith(f"Response{told}")
    for name in ("error", "id", "output", "tool_choice"):
        missing = {key: value for key, value in answer.items() if key != name}
        (found,) = set(described.deviations(missing, "Response")) - usual
        assert found == f"Response: {name!r} is a required property"
    with pytest.raises(KeyError):
        described.deviations(answer, "Answer")


def test_another_description_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKSUMS, "openai", "0" * 64)
    with pytest.raises(ValueError, match="openai's description has the SHA-256 a203"):
        Description("openai")
