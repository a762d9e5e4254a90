"""The official openai client's Responses API and parse helpers against the real listener."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from core.errors import (
    ContextLengthExceeded,
    CrashingRequest,
    EngineFailed,
    NoTokenLeft,
    QueueFull,
    QueueTooShort,
)
from core.types import (
    ChatMessage,
    ChatPrompt,
    Finished,
    JsonOutput,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from router.app import create_app
from router.context import Pacing
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import serving

KEY = "key-1234"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLS = (
    ReasoningDelta("I should "),
    ReasoningDelta("look."),
    TextDelta("Let me "),
    TextDelta("see."),
    ToolCallDelta(0, "call_1", "weather"),
    ToolCallDelta(0, arguments='{"city": '),
    ToolCallDelta(0, arguments='"Köln"}'),
    ToolCallDelta(1, "call_2", "weather", '{"city": "Bonn"}'),
    Finished("tool_calls", Usage(20, 9, 5, 3)),
)


class City(BaseModel):
    """What a parsed answer becomes."""

    name: str


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher(TextDelta("Hel"), TextDelta("lo"), finished())


@pytest.fixture
async def client(dispatcher: FakeDispatcher) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    pacing = Pacing(header_wait_s=0.01, early_keep_alive_s=0.01)
    app = create_app(make_services(dispatcher, api_key=KEY), pacing=pacing)
    async with serving(app) as port:
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            yield client


def prompt_of(dispatcher: FakeDispatcher) -> ChatPrompt:
    prompt = dispatcher.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def test_sdk_gets_a_response(client: openai.AsyncOpenAI, dispatcher: FakeDispatcher) -> None:
    response = await client.responses.create(
        model="tiny", input="hi", instructions="Be brief.", max_output_tokens=9, temperature=0.5
    )
    assert response.output_text == "Hello"
    assert (response.status, response.model, response.error) == ("completed", CHAT_MODEL, None)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.total_tokens) == (7, 9)
    assert response.usage.input_tokens_details.cached_tokens == 3
    (request,) = dispatcher.requests
    assert prompt_of(dispatcher).messages == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "hi"),
    )
    assert (request.max_tokens, request.sampling.temperature) == (9, 0.5)


async def test_sdk_streams_the_full_sequence_behind_keep_alives_s2(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    gate = asyncio.Event()
    dispatcher.script = (PrefillProgress(5, 20), gate, *CALLS)
    stream = await client.responses.create(model="tiny", input="hi", tools=[WEATHER], stream=True)
    gate.set()
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    text, part, item = "output_text", "content_part", "output_item"
    call = "function_call_arguments"
    assert names == [
        "created", "in_progress",
        f"{item}.added", f"{part}.added", *["reasoning_text.delta"] * 2, "reasoning_text.done",
        f"{part}.done", f"{item}.done",
        f"{item}.added", f"{part}.added", *[f"{text}.delta"] * 2, f"{text}.done",
        f"{part}.done", f"{item}.done",
        f"{item}.added", *[f"{call}.delta"] * 2, f"{call}.done", f"{item}.done",
        f"{item}.added", f"{call}.delta", f"{call}.done", f"{item}.done",
        "completed",
    ]  # fmt: skip
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        adapter.validate_python(event.model_dump(by_alias=True))


async def test_stream_and_whole_answer_are_the_same(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = CALLS
    async with client.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:
        streamed = await stream.get_final_response()
    whole = await client.responses.create(model="tiny", input="hi", tools=[WEATHER])

    def plain(response: Any) -> Any:
        items = response.model_dump(exclude_unset=True)["output"]
        return [{k: v for k, v in item.items() if k not in ("id", "parsed_arguments")}
                for item in items]  # fmt: skip

    assert json.dumps(plain(whole)) == json.dumps(plain(streamed)).replace(', "parsed": null', "")
    assert [item.type for item in whole.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]


async def test_sdk_makes_a_tool_round_trip(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = CALLS
    first = await client.responses.create(
        model="tiny", input="hi", tools=[WEATHER], reasoning={"effort": "high"}, store=False
    )
    outputs: list[Any] = [
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "sun"}],
        },
    ]
    history: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        *(item.model_dump(exclude_unset=True) for item in first.output),
        *outputs,
    ]
    await client.responses.create(model="tiny", input=history, tools=[WEATHER])
    expected = (
        ChatMessage("user", "hi"),
        ChatMessage(
            "assistant",
            "Let me see.",
            reasoning="I should look.",
            tool_calls=(
                ToolCall("call_1", "weather", '{"city": "Köln"}'),
                ToolCall("call_2", "weather", '{"city": "Bonn"}'),
            ),
        ),
        ChatMessage("tool", "rain", tool_call_id="call_1"),
        ChatMessage("tool", "sun", tool_call_id="call_2"),
    )
    assert prompt_of(dispatcher).messages == expected

    stored = await client.responses.create(model="tiny", input="hi", tools=[WEATHER])
    await client.responses.create(
        model="tiny", input=outputs, previous_response_id=stored.id, instructions="New."
    )
    assert prompt_of(dispatcher).messages == (ChatMessage("system", "New."), *expected)


async def test_sdk_retrieves_and_deletes_what_is_stored(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="tiny", input="hi") as stream:
        response = await stream.get_final_response()
    kept = await client.responses.retrieve(response.id)
    assert (kept.id, kept.output_text) == (response.id, "Hello")
    await client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            await call(response.id)


async def test_sdk_counts_tokens_of_the_whole_conversation(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    first = await client.responses.create(model="tiny", input="hi")
    count = await client.responses.input_tokens.count(
        model="tiny", input="on", previous_response_id=first.id, tools=[WEATHER]
    )
    assert count.input_tokens == 42
    (prompt,) = dispatcher.counted
    assert isinstance(prompt, ChatPrompt)
    assert [message.content for message in prompt.messages] == ["hi", "Hello", "on"]
    assert len(dispatcher.requests) == 1


async def test_response_that_is_not_stored_cannot_be_followed(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="tiny", input="hi", store=False)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="tiny", input="x", previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"


async def test_sdk_parses_structured_answers_of_both_apis(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (TextDelta('{"name": "Bonn"}'), finished())
    response = await client.responses.parse(model="tiny", input="hi", text_format=City)
    assert response.output_parsed == City(name="Bonn")
    output = dispatcher.requests[0].output
    assert isinstance(output, JsonOutput)
    assert output.schema is not None
    assert output.schema["properties"] == {"name": {"title": "Name", "type": "string"}}
    completion = await client.beta.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "hi"}], response_format=City
    )
    assert completion.choices[0].message.parsed == City(name="Bonn")
    assert dispatcher.requests[1].output == output


async def test_answer_at_its_limit_is_incomplete(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (TextDelta("x"), finished("length"))
    response = await client.responses.create(model="tiny", input="hi", max_output_tokens=1)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    stream = await client.responses.create(model="tiny", input="hi", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"


async def test_reasoning_comes_sealed_when_asked_for(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (ReasoningDelta("hm"), TextDelta("x"), finished())
    first = await client.responses.create(
        model="tiny", input="hi", store=False, include=["reasoning.encrypted_content"]
    )
    encode_reasoning = first.output[0]
    assert encode_reasoning.type == "reasoning"
    back: list[Any] = [
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "other"},
        {"type": "reasoning", "id": encode_reasoning.id, "summary": [],
         "encrypted_content": encode_reasoning.encrypted_content},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "on"},
    ]  # fmt: skip
    await client.responses.create(model="tiny", input=back)
    assert prompt_of(dispatcher).messages[0] == ChatMessage("assistant", "x", reasoning="hm")


@pytest.mark.parametrize("streams", [True, False])
async def test_logprobs_come_with_the_text(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, *, streams: bool
) -> None:
    token = TokenLogprob(1, b"x", -0.5, (TokenLogprob(2, b"y", -1.0),))
    dispatcher.script = (TextDelta("x", (1,), (token,)), TextDelta("x", (1,), (token,)), finished())
    if streams:
        async with client.responses.stream(model="tiny", input="hi", top_logprobs=1) as stream:
            response: Any = await stream.get_final_response()
    else:
        response = await client.responses.create(model="tiny", input="hi", top_logprobs=1)
    logprobs = response.output[0].content[0].logprobs
    assert [(entry.token, entry.top_logprobs[0].token) for entry in logprobs] == [("x", "y")] * 2
    assert dispatcher.requests[0].sampling.top_logprobs == 1


async def test_empty_answer_is_one_empty_message(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (finished(),)
    response = await client.responses.create(model="tiny", input="hi")
    assert [item.type for item in response.output] == ["message"]
    assert response.output_text == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineFailed("It died."), "server_error"),
        (QueueFull("Full."), "rate_limit_exceeded"),
        (ContextLengthExceeded.of(9, 5), "invalid_prompt"),
        # Clients send again what failed with another code, and these would fail again.
        (QueueTooShort("Too many."), "invalid_prompt"),
        (NoTokenLeft("None."), "invalid_prompt"),
        (CrashingRequest("It crashes."), "invalid_prompt"),
    ],
)
async def test_failure_in_the_middle_is_told_and_not_stored_s3(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, error: Any, code: str
) -> None:
    dispatcher.script = (TextDelta("x"), error)
    stream = await client.responses.create(model="tiny", input="hi", stream=True)
    events = [event async for event in stream]
    told, failed = events[-2:]
    assert told.type == "error"
    assert (told.code, told.message) == (error.code, error.message)
    assert failed.type == "response.failed"
    assert failed.response.error is not None
    assert failed.response.error.code == code
    assert failed.response.output_text == "x"
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(failed.response.id)


async def test_sdk_raises_before_the_first_event(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (ContextLengthExceeded.of(9, 5),)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 5") as caught:
        await client.responses.create(model="tiny", input="hi", stream=True)
    assert caught.value.code == "context_length_exceeded"
