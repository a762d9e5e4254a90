"""The official anthropic client against the real listener."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam

from core.errors import ContextLengthExceeded, EngineFailed, InsufficientMemory, QueueFull
from core.types import (
    ChatMessage,
    ChatPrompt,
    Finished,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from router.app import create_app
from router.context import Pacing
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import serving

KEY = "key-1234"
HI: list[MessageParam] = [{"role": "user", "content": "hi"}]
WEATHER: ToolParam = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLS = (
    ReasoningDelta("I should "),
    ReasoningDelta("look."),
    TextDelta("\n\n"),
    TextDelta("Let me see."),
    ToolCallDelta(0, "call_1", "weather"),
    ToolCallDelta(0, arguments='{"city": '),
    ToolCallDelta(0, arguments='"Köln"}'),
    ToolCallDelta(1, "call_2", "weather", '{"city": "Bonn"}'),
    Finished("tool_calls", Usage(20, 9, 5, 3)),
)


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher(TextDelta("Hel"), TextDelta("lo"), finished())


@pytest.fixture
async def client(dispatcher: FakeDispatcher) -> AsyncGenerator[anthropic.AsyncAnthropic, None]:
    pacing = Pacing(header_wait_s=0.01, early_keep_alive_s=0.01)
    app = create_app(make_services(dispatcher, api_key=KEY), pacing=pacing)
    async with serving(app) as port:
        url = f"http://127.0.0.1:{port}"
        async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0) as client:
            yield client


async def test_sdk_gets_a_message(client: anthropic.AsyncAnthropic) -> None:
    message = await client.messages.create(model="tiny", max_tokens=64, messages=HI, system="Be.")
    assert message.content[0].type == "text"
    assert message.content[0].text == "Hello"
    assert (message.role, message.model, message.stop_reason) == (
        "assistant",
        CHAT_MODEL,
        "end_turn",
    )
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 3, 2)


async def test_sdk_streams_text_behind_pings_and_prefill_s2(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher
) -> None:
    gate = asyncio.Event()
    dispatcher.script = (PrefillProgress(512, 4096), gate, *dispatcher.script)
    async with client.messages.stream(model="tiny", max_tokens=64, messages=HI) as stream:
        gate.set()
        text = "".join([piece async for piece in stream.text_stream])
        message = await stream.get_final_message()
    assert text == "Hello"
    assert message.stop_reason == "end_turn"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (4, 3)
    assert message.usage.output_tokens == 2


@pytest.mark.parametrize("streams", [True, False])
async def test_sdk_makes_a_tool_round_trip_with_thinking(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher, *, streams: bool
) -> None:
    dispatcher.script = CALLS
    options: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 4096,
        "tools": [WEATHER],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    if streams:
        async with client.messages.stream(messages=HI, **options) as stream:
            message = await stream.get_final_message()
    else:
        message = await client.messages.create(messages=HI, **options)
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["thinking", "text", *["tool_use"] * 2]
    assert message.content[3].type == "tool_use"
    assert message.content[3].input == {"city": "Bonn"}
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens == 3

    dispatcher.script = (TextDelta("Rain."), finished())
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
        {
            "type": "tool_result",
            "tool_use_id": "call_2",
            "is_error": True,
            "content": [{"type": "text", "text": "no such city"}],
        },
        {"type": "text", "text": "And now?"},
    ]
    history: list[MessageParam] = [*HI, message.to_param(), {"role": "user", "content": results}]
    answer = await client.messages.create(messages=history, **options)
    assert answer.content[0].type == "text"
    prompt = dispatcher.requests[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_kwargs == {"enable_thinking": True, "thinking": True}
    assert prompt.messages == (
        ChatMessage("user", "hi"),
        ChatMessage(
            "assistant",
            "\n\nLet me see.",
            reasoning="I should look.",
            tool_calls=(
                ToolCall("call_1", "weather", '{"city": "Köln"}'),
                ToolCall("call_2", "weather", '{"city": "Bonn"}'),
            ),
        ),
        ChatMessage("tool", "rain", tool_call_id="call_1"),
        ChatMessage("tool", "Error: no such city", tool_call_id="call_2"),
        ChatMessage("user", "And now?"),
    )


async def test_sdk_streams_every_block_in_turn(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = CALLS
    stream = await client.messages.create(model="tiny", max_tokens=64, messages=HI, stream=True)
    events = [event async for event in stream]
    shape = [(event.type, getattr(event, "index", None)) for event in events]
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert shape == [
        ("message_start", None),
        (start, 0), *[(delta, 0)] * 3, (stop, 0),
        (start, 1), (delta, 1), (stop, 1),
        (start, 2), *[(delta, 2)] * 2, (stop, 2),
        (start, 3), (delta, 3), (stop, 3),
        ("message_delta", None),
        ("message_stop", None),
    ]  # fmt: skip


async def test_sdk_counts_tokens(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher
) -> None:
    count = await client.messages.count_tokens(model="tiny", messages=HI, tools=[WEATHER])
    assert count.input_tokens == 42
    (prompt,) = dispatcher.counted
    assert isinstance(prompt, ChatPrompt)
    assert [tool.name for tool in prompt.tools] == ["weather"]
    assert dispatcher.requests == []


async def test_sdk_hides_thinking_and_gets_it_back_sealed(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = CALLS
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    messages = HI
    for streams in (True, False):
        async with client.messages.stream(
            model="tiny", max_tokens=64, messages=messages, thinking=thinking
        ) as stream:
            message = await stream.get_final_message()
        assert message.content[0].type == "thinking"
        assert message.content[0].thinking == ""
        messages = [*HI, message.to_param(), {"role": "user", "content": "on"}]
        del streams
    prompt = dispatcher.requests[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[1].reasoning == "I should look."


@pytest.mark.parametrize(
    ("error", "expected", "kind"),
    [
        (ContextLengthExceeded.of(90, 80), anthropic.BadRequestError, "invalid_request_error"),
        (QueueFull("Full.", retry_after_s=1), anthropic.RateLimitError, "rate_limit_error"),
        (InsufficientMemory("No room."), anthropic.InternalServerError, "overloaded_error"),
        (KeyError("bug"), anthropic.InternalServerError, "api_error"),
    ],
)
async def test_sdk_raises_its_own_class_for_each_error(
    client: anthropic.AsyncAnthropic,
    dispatcher: FakeDispatcher,
    error: Exception,
    expected: type[anthropic.APIStatusError],
    kind: str,
) -> None:
    dispatcher.script = (error,)
    with pytest.raises(expected) as caught:
        await client.messages.create(model="tiny", max_tokens=64, messages=HI)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == kind
    assert body["request_id"] == caught.value.request_id
    if isinstance(error, ContextLengthExceeded):
        assert body["error"]["message"] == "prompt is too long: 90 tokens > 80 maximum"


async def test_sdk_raises_for_wrong_key_and_unknown_model(
    client: anthropic.AsyncAnthropic,
) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        await client.messages.create(model="org/nothing", max_tokens=64, messages=HI)
    with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
        await client.with_options(api_key="wrong").messages.count_tokens(model="tiny", messages=HI)


async def test_sdk_raises_in_the_middle_of_a_stream_s3(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (TextDelta("x"), EngineFailed("The engine died."))
    stream = await client.messages.create(model="tiny", max_tokens=64, messages=HI, stream=True)
    kinds: list[str] = []

    async def read() -> None:
        async for event in stream:
            kinds.append(event.type)

    with pytest.raises(anthropic.APIStatusError, match="The engine died") as caught:
        await read()
    assert caught.value.status_code == 200
    assert kinds == ["message_start", "content_block_start", "content_block_delta"]
