"""`compaction` of the Messages API: a summary of the conversation instead of an answer."""

from collections.abc import AsyncGenerator
from typing import Any

import anthropic
import pytest
from anthropic.types import beta

from core.types import ChatPrompt, ReasoningDelta, TextDelta
from router.app import create_app
from tests.fakes import FakeDispatcher, finished, make_services
from tests.live_server import serving
from tests.sdk.types_of_answers import deviations

HISTORY: Any = [
    {"role": "user", "content": "My name is Ada."},
    {"role": "assistant", "content": "Hello Ada."},
]
TOOL: Any = {"name": "read", "input_schema": {"type": "object"}}


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher(ReasoningDelta("hm"), TextDelta("Ada "), TextDelta("said."), finished())


@pytest.fixture
async def client(dispatcher: FakeDispatcher) -> AsyncGenerator[anthropic.AsyncAnthropic, None]:
    async with serving(create_app(make_services(dispatcher))) as port:
        url = f"http://127.0.0.1:{port}"
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as one:
            yield one


def request(**fields: Any) -> Any:
    asked: Any = {"compaction": {"type": "summarize"}, "tools": [TOOL], "messages": HISTORY}
    return {"model": "tiny", "max_tokens": 50, **asked, **fields}


@pytest.mark.parametrize("instructions", [None, " ", "List the names."])
async def test_conversation_is_summarized_as_one_block(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher, instructions: str | None
) -> None:
    wanted = {"type": "summarize", "instructions": instructions}
    message = await client.beta.messages.create(**request(compaction=wanted))
    (block,) = message.content
    assert (block.type, message.stop_reason) == ("compaction", "compaction")
    assert block.content == "Ada said."
    assert deviations(message.model_dump(mode="json", exclude_unset=True), beta.BetaMessage) == []
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [one.role for one in prompt.messages] == ["user", "assistant", "user"]
    asked = prompt.messages[-1].content
    assert asked.startswith("List the names." if instructions == "List the names." else "Write a")
    assert (prompt.tools, prompt.continues_answer) == ((), False)


@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_summary_is_streamed_as_one_delta(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher, reason: Any
) -> None:
    dispatcher.script = (*dispatcher.script[:-1], finished(reason))
    events = []
    async with client.beta.messages.stream(**request()) as stream:
        async for event in stream:
            events.append(event.type)
        message = await stream.get_final_message()
    (block,) = message.content
    assert block.type == "compaction"
    assert block.content == "Ada said."
    assert message.stop_reason == ("compaction" if reason == "stop" else "max_tokens")
    assert events.count("content_block_delta") == 1


async def test_summary_that_failed_is_null(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (ReasoningDelta("hm"), finished())
    message = await client.beta.messages.create(**request())
    assert [block.model_dump(exclude_unset=True) for block in message.content] == [
        {"type": "compaction", "content": None, "encrypted_content": None}
    ]


async def test_summary_is_read_in_place_of_its_messages(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher
) -> None:
    message = await client.beta.messages.create(**request())
    (block,) = message.content
    history: Any = [
        {"role": "user", "content": [block.model_dump(exclude_unset=True)]},
        {"role": "user", "content": "Who am I?"},
    ]
    await client.beta.messages.create(model="tiny", max_tokens=9, messages=history)
    prompt = dispatcher.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [one.content for one in prompt.messages] == ["Ada said.", "Who am I?"]


async def test_count_is_that_of_the_conversation(
    client: anthropic.AsyncAnthropic, dispatcher: FakeDispatcher
) -> None:
    asked: Any = {"type": "summarize"}
    await client.beta.messages.count_tokens(model="tiny", messages=HISTORY, compaction=asked)
    (prompt,) = dispatcher.counted
    assert isinstance(prompt, ChatPrompt)
    assert [one.content for one in prompt.messages] == ["My name is Ada.", "Hello Ada."]
