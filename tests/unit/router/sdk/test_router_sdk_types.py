"""Every answer and every event of every endpoint has the types of OpenAI's and Anthropic's SDKs."""

from typing import Any

import anthropic.types as of_anthropic
import httpx
import openai.types as of_openai
import pytest
from anthropic.types import beta
from openai.types import responses
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from openai.types.shared import ErrorObject

from core.errors import ContextLengthExceeded, EngineFailed, QueueFull
from core.types import ReasoningDelta, TextDelta
from tests.fakes import FakeDispatcher
from tests.sdk.samples_of_requests import fields, samples
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
from tests.sdk.types_of_answers import deviations, sse_events

# A field that the SDK's types know where it is sent, but not where it is listed.
UNLIKE_WHAT_IS_SENT = (
    "skills: not known to openai.types.responses.response_local_environment"
    ".ResponseLocalEnvironment"
)


def check(value: Any, kind: Any) -> None:
    assert deviations(value, kind) == []


CASES = [
    pytest.param(name, option, script, id=f"{name}-{index}-{script}")
    for name, options in OPTIONS.items()
    for index, option in enumerate(options)
    for script in SCRIPTS
]


@pytest.mark.parametrize(("name", "option", "script"), CASES)
async def test_answer_and_events_have_the_types_of_the_sdk(
    client: httpx.AsyncClient,
    dispatcher: FakeDispatcher,
    name: str,
    option: dict[str, Any],
    script: str,
) -> None:
    api = APIS[name]
    dispatcher.script = SCRIPTS[script]
    check((await post(client, api, option)).json(), api.answer)

    events = sse_events((await post(client, api, {**option, "stream": True})).text)
    assert events
    for event_name, event in events:
        if event_name is not None:
            assert event["type"] == event_name
        if event_name != "ping":
            check(event, api.event)


@pytest.mark.parametrize("option", [{}, {"timings_per_token": True}])
@pytest.mark.parametrize("name", ["chat", "completions"])
async def test_usage_in_a_stream_has_the_types_of_the_sdk(
    client: httpx.AsyncClient, name: str, option: dict[str, Any]
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, **option}
    events = sse_events((await post(client, APIS[name], options)).text)
    assert [event["usage"] is None for _, event in events] == [True] * (len(events) - 1) + [False]
    for _, event in events:
        check(event, APIS[name].event)


@pytest.mark.parametrize(
    "error", [EngineFailed("It died."), QueueFull("Full."), ContextLengthExceeded.of(9, 5)]
)
@pytest.mark.parametrize("name", APIS)
async def test_errors_have_the_types_of_the_sdk(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher, name: str, error: Exception
) -> None:
    api = APIS[name]
    dispatcher.script = (error,)
    response = await client.post(api.path, json={"model": "tiny", **api.body})
    assert response.status_code >= 400
    check_error(name, response.json())

    dispatcher.script = (ReasoningDelta("hm"), TextDelta("x"), error)
    events = sse_events((await post(client, api, {"stream": True})).text)
    for event_name, event in events:
        if "error" in event and event_name in (None, "error"):
            check_error(name, event)
        else:
            check(event, api.event)
    assert any(event_name == "error" or "error" in event for event_name, event in events)


def check_error(name: str, body: dict[str, Any]) -> None:
    if name == "messages":
        check(body, of_anthropic.shared.ErrorResponse)
    elif name == "beta":
        check(body, of_anthropic.BetaErrorResponse)
    else:
        assert set(body) == {"error"}
        check(body["error"], ErrorObject)
        assert {"type", "message", "param", "code"} <= set(body["error"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": 5}),
        ("/v1/responses", {"input": []}),
        ("/v1/completions", {"model": "none", "prompt": "x"}),
        ("/v1/embeddings", {"model": "tiny", "input": "x"}),
        ("/v1/nothing", {}),
    ],
)
async def test_refusals_have_the_types_of_the_sdk(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code in (400, 404)
    check_error("chat", response.json())


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_refusals_of_messages_have_the_types_of_the_sdk(
    client: httpx.AsyncClient, path: str
) -> None:
    response = await client.post(path, json={"messages": 5})
    assert response.status_code == 400
    check_error("messages", response.json())
    check_error("beta", response.json())


async def test_stored_answers_have_the_types_of_the_sdk(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = CALLS
    body = {"tools": RESPONSE_TOOLS, "input": [*USER, *HISTORY[1:], *USER]}
    first = (await post(client, APIS["responses"], body)).json()
    second = (await post(client, APIS["responses"], {"previous_response_id": first["id"]})).json()
    path = f"/v1/responses/{second['id']}"
    kept = await client.get(path)
    assert kept.json() == second
    check(kept.json(), responses.Response)

    page = (await client.get(f"{path}/input_items", params={"limit": 100})).json()
    check(page, responses.ResponseItemList)
    types = {item["type"] for item in page["data"]}
    assert types >= {"message", "reasoning", "function_call", "custom_tool_call"}

    cancelled = await client.post(f"{path}/cancel", json={})
    assert cancelled.status_code == 400
    check_error("responses", cancelled.json())
    deleted = await client.delete(path)
    assert deleted.json() == {"id": second["id"], "object": "response", "deleted": True}
    check_error("responses", (await client.get(path)).json())


async def test_sent_items_are_listed_with_the_types_of_the_sdk(client: httpx.AsyncClient) -> None:
    question = {"role": "user", "content": "hi"}
    tried = set()
    for sent in samples(fields(ResponseCreateParamsBase)["input"]):
        if isinstance(sent, str) or sent[0].get("type") == "item_reference":
            continue
        tried.add(sent[0].get("type"))
        answer = (await post(client, APIS["responses"], {"input": [*sent, question]})).json()
        path = f"/v1/responses/{answer['id']}/input_items"
        page = (await client.get(path)).json()
        found = deviations(page, responses.ResponseItemList)
        assert [text for text in found if not text.endswith(UNLIKE_WHAT_IS_SENT)] == [], sent
    assert tried > {None, "message", "shell_call", "compaction_trigger", "tool_search_output"}


async def test_embeddings_have_the_types_of_the_sdk(client: httpx.AsyncClient) -> None:
    for inputs in ("a", ["a", "b"], [1, 2]):
        response = await client.post("/v1/embeddings", json={"model": "mini", "input": inputs})
        check(response.json(), of_openai.CreateEmbeddingResponse)


async def test_models_have_the_types_of_the_sdks(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert set(listed) == {"object", "data"}
    check(listed["data"], list[of_openai.Model])
    check((await client.get("/v1/models/tiny")).json(), of_openai.Model)

    headers = {"anthropic-version": "2023-06-01"}
    page = (await client.get("/v1/models", headers=headers)).json()
    assert set(page) == {"data", "has_more", "first_id", "last_id"}
    one = (await client.get("/v1/models/tiny", headers=headers)).json()
    for kind in (of_anthropic.ModelInfo, beta.BetaModelInfo):
        check([*page["data"], one], list[kind])  # type: ignore[valid-type]


async def test_counts_have_the_types_of_the_sdks(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "messages": USER, "tools": MESSAGE_TOOLS}
    counted = (await client.post("/v1/messages/count_tokens", json=body)).json()
    check(counted, of_anthropic.MessageTokensCount)
    asked: Any = {"model": "tiny", "input": "hi", "tools": RESPONSE_TOOLS}
    counted = (await client.post("/v1/responses/input_tokens", json=asked)).json()
    check(counted, InputTokenCountResponse)


async def test_comparison_finds_each_kind_of_deviation(client: httpx.AsyncClient) -> None:
    answer = (await post(client, APIS["responses"], {})).json()
    (item,) = answer["output"]
    broken: list[tuple[dict[str, Any], str]] = [
        ({"id": 5}, ".id: 5 is not of type str"),
        ({"object": "answer"}, ".object: 'answer' is none of"),
        ({"extra": 1}, ".extra: not known"),
        ({"parallel_tool_calls": "yes"}, ".parallel_tool_calls: 'yes' is not of type bool"),
        ({"output": [{**item, "type": "text"}]}, ".output[0]: of type 'text'"),
        ({"output": [{**item, "role": "user"}]}, ".output[0].role: 'user' is none of"),
        ({"output": item}, "is not a list"),
        ({"metadata": {"a": 1}}, ".metadata.a: 1 is not of type str"),
    ]
    for change, told in broken:
        (found,) = deviations({**answer, **change}, responses.Response)
        assert told in found
    for name in ("error", "id", "output", "tool_choice"):
        missing = {key: value for key, value in answer.items() if key != name}
        (found,) = deviations(missing, responses.Response)
        assert found.startswith(f".{name}: required")
