"""`thread` of Anthropic's Messages API: kept conversations, and what its SDK does without them."""

from typing import Any

import anthropic
import httpx
import pytest
from anthropic import beta_async_tool

from core.errors import ThreadNotFound, ThreadUnsupported
from core.types import ChatMessage, ChatPrompt, ReasoningDelta, TextDelta, ToolCall, ToolCallDelta
from router.app import create_app
from router.v1.messages.threads import KeptThread, ThreadStore
from tests.fakes import FakeDispatcher, finished, make_services
from tests.live_server import client_of, serving

TOOL = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
HI = [{"role": "user", "content": "My word is BANANA."}]
NEXT = [{"role": "user", "content": "Which word?"}]
CALL = (
    ReasoningDelta("Look."),
    TextDelta("So"),
    ToolCallDelta(0, "c1", "weather", '{"city": "Bonn"}'),
    finished("tool_calls"),
)


def body(messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 60, "messages": messages, **fields}


def continuing(previous: str) -> dict[str, Any]:
    return {"type": "continue", "previous_message_id": previous}


def prompts(dispatcher: FakeDispatcher) -> list[ChatPrompt]:
    found = [request.prompt for request in dispatcher.requests]
    assert all(isinstance(prompt, ChatPrompt) for prompt in found)
    return found  # type: ignore[return-value]


async def answer_id(client: httpx.AsyncClient, fields: dict[str, Any]) -> str:
    response = await client.post("/v1/messages", json=fields)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return str(response.json()["id"])
    return "msg_" + response.headers["x-request-id"].removeprefix("req_")


@pytest.mark.parametrize("streams", [True, False])
async def test_continued_turn_has_the_whole_conversation_f5(*, streams: bool) -> None:
    dispatcher = FakeDispatcher(*CALL)
    async with client_of(create_app(make_services(dispatcher))) as client:
        first = body(HI, system="Be brief.", tools=[TOOL], thread={"type": "create"})
        first_id = await answer_id(client, {**first, "stream": streams})
        result = {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}
        turn = [{"role": "user", "content": [result, {"type": "text", "text": "Which word?"}]}]
        dispatcher.script = (TextDelta("BANANA"), finished())
        second = body(turn, thread=continuing(first_id), stream=streams)
        second_id = await answer_id(client, second)
        # The same turn again, as a client does that lost the answer.
        await answer_id(client, second)
        await answer_id(client, body(NEXT, thread=continuing(second_id)))
        count = await client.post("/v1/messages/count_tokens", json=second)
    assert count.status_code == 200
    history = (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "My word is BANANA."),
        ChatMessage(
            "assistant",
            "So",
            reasoning="Look.",
            tool_calls=(ToolCall("c1", "weather", '{"city": "Bonn"}'),),
        ),
        ChatMessage("tool", "sunny", tool_call_id="c1"),
        ChatMessage("user", "Which word?"),
    )
    sent = prompts(dispatcher)
    assert [prompt.messages for prompt in sent] == [
        history[:2],
        history,
        history,
        (*history, ChatMessage("assistant", "BANANA"), ChatMessage("user", "Which word?")),
    ]
    assert dispatcher.counted == [sent[1]]
    assert all([tool.name for tool in prompt.tools] == ["weather"] for prompt in sent)


async def test_continued_turn_equals_the_conversation_sent_whole() -> None:
    dispatcher = FakeDispatcher(*CALL)
    thinking = {"type": "adaptive", "display": "omitted"}
    async with client_of(create_app(make_services(dispatcher))) as client:
        first = body(HI, tools=[TOOL], thread={"type": "create"}, thinking=thinking)
        answer = (await client.post("/v1/messages", json=first)).json()
        await answer_id(client, body(NEXT, thread=continuing(answer["id"])))
        whole = [*HI, {"role": "assistant", "content": answer["content"]}, *NEXT]
        await answer_id(client, body(whole, tools=[TOOL]))
    _, continued, sent_whole = prompts(dispatcher)
    assert continued.messages == sent_whole.messages
    assert continued.tools == sent_whole.tools


async def test_system_and_tools_of_a_later_turn_replace_the_kept_ones() -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        first = body(HI, system="Be brief.", tools=[TOOL], thread={"type": "create"})
        kept = await answer_id(client, first)
        second = body(NEXT, system="Be long.", tools=[], thread=continuing(kept))
        await answer_id(client, second)
    prompt = prompts(dispatcher)[1]
    assert prompt.messages[:2] == (
        ChatMessage("system", "Be long."),
        ChatMessage("user", "My word is BANANA."),
    )
    assert prompt.tools == ()


@pytest.mark.parametrize(
    ("settings", "thread", "status", "code"),
    [
        ({}, continuing("msg_x"), 404, "thread_not_found"),
        ({"stored_responses": 0}, continuing("msg_x"), 400, "thread_unsupported_request"),
        ({"stored_responses": 0}, {"type": "create"}, 400, "thread_unsupported_request"),
        ({"stored_responses_bytes": 0}, {"type": "create"}, 400, "thread_unsupported_request"),
        ({}, {"type": "continue"}, 400, None),
        ({}, {"type": "create", "previous_message_id": "msg_x"}, 400, None),
        ({}, {"type": "fork"}, 400, None),
    ],
)
async def test_thread_that_cannot_be_honoured_is_refused_with_its_code(
    settings: dict[str, Any], thread: dict[str, Any], status: int, code: str | None
) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher, **settings))) as client:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            response = await client.post(path, json=body(HI, thread=thread))
            error = response.json()["error"]
            assert response.status_code == status
            assert error.get("details", {}).get("error_code") == code
            assert "thread" in error["message"]
    assert dispatcher.requests == []


async def test_answer_without_thread_is_not_kept() -> None:
    async with client_of(create_app(make_services())) as client:
        first = await answer_id(client, body(HI))
        response = await client.post("/v1/messages", json=body(NEXT, thread=continuing(first)))
    assert response.json()["error"]["details"] == {"error_code": "thread_not_found"}


@pytest.mark.parametrize("kept", [1000, 0])
async def test_sdk_tool_runner_has_the_conversation_in_every_turn(kept: int) -> None:
    @beta_async_tool
    async def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: The city.
        """
        return f"rain in {city}"

    dispatcher = FakeDispatcher(*CALL)

    async def play(client: anthropic.AsyncAnthropic) -> None:
        runner = client.beta.messages.tool_runner(
            model="tiny",
            max_tokens=60,
            tools=[weather],
            messages=[{"role": "user", "content": "My word is BANANA."}],
        )
        async for message in runner:
            assert message.content
            dispatcher.script = (TextDelta("BANANA"), finished())

    async with serving(create_app(make_services(dispatcher, stored_responses=kept))) as port:
        url = f"http://127.0.0.1:{port}"
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client:
            await play(client)
    first, second = prompts(dispatcher)
    assert second.messages[: len(first.messages)] == first.messages
    assert second.messages[-1] == ChatMessage("tool", "rain in Bonn", tool_call_id="c1")
    assert [tool.name for tool in second.tools] == ["weather"]


def conversation(size: int) -> KeptThread:
    return KeptThread(messages=(ChatMessage("user", "x" * size),))


def test_store_is_bounded_and_drops_continued_conversations_first() -> None:
    store = ThreadStore(max_count=2, max_bytes=100_000)
    store.put("a", conversation(10), None)
    store.put("b", conversation(10), None)
    store.put("c", conversation(10), "b")
    assert len(store) == 2
    with pytest.raises(ThreadNotFound):
        store.get("b")
    assert store.get("a") == store.get("c")
    store.put("big", conversation(100_000), None)
    with pytest.raises(ThreadNotFound):
        store.get("big")
    for index in range(20):
        store.put(str(index), conversation(10_000), None)
        assert store.used_bytes <= 100_000
    assert store.get("19") == conversation(10_000)
    with pytest.raises(ThreadUnsupported):
        ThreadStore(max_count=0, max_bytes=1).get("a")


def test_store_counts_everything_it_keeps() -> None:
    store = ThreadStore(max_count=9, max_bytes=10**9)
    sizes = []
    for message in (
        ChatMessage("user", "x" * 1000),
        ChatMessage("assistant", "", reasoning="x" * 1000),
        ChatMessage("assistant", "", tool_calls=(ToolCall("c", "n", "x" * 1000),)),
        ChatMessage("tool", "", tool_call_id="x" * 1000),
    ):
        before = store.used_bytes
        store.put(str(len(store)), KeptThread(messages=(message,)), None)
        sizes.append(store.used_bytes - before)
    assert min(sizes) >= 4000
