"""The official openai client against the real listener."""

import asyncio
from collections.abc import AsyncGenerator

import openai
import pytest

from core.errors import ContextLengthExceeded, EngineFailed, InsufficientMemory, QueueFull
from core.types import TextDelta, ToolCallDelta
from router.app import create_app
from router.context import Pacing
from tests.fakes import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    RERANK_MODEL,
    FakeDispatcher,
    finished,
    make_services,
)
from tests.live_server import serving

KEY = "key-1234"


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


async def test_sdk_chats(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}]
    )
    assert answer.choices[0].message.content == "Hello"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 9


async def test_sdk_streams_with_keep_alives_and_usage(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    gate = asyncio.Event()
    dispatcher.script = (gate, *dispatcher.script)
    stream = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    gate.set()
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 9


async def test_sdk_assembles_tool_calls_from_a_stream(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (
        ToolCallDelta(0, "c1", "weather", '{"city":'),
        ToolCallDelta(0, arguments='"Bonn"}'),
        finished("tool_calls"),
    )
    async with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "hi"}]
    ) as stream:
        completion = await stream.get_final_completion()
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    assert (calls[0].id, calls[0].function.name) == ("c1", "weather")
    assert calls[0].function.arguments == '{"city":"Bonn"}'


async def test_sdk_completes_streamed_and_whole(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model=CHAT_MODEL, prompt="hi")
    stream = await client.completions.create(model=CHAT_MODEL, prompt="hi", stream=True)
    chunks = [chunk async for chunk in stream]
    assert whole.choices[0].text == "Hello"
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_sdk_embeds_by_its_base64_default(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    response = await client.embeddings.create(model="mini", input=["a", "b"])
    assert [item.embedding for item in response.data] == [[0.0, 0.5, -1.25], [1.0, 0.5, -1.25]]
    assert response.model == EMBEDDING_MODEL
    assert len(dispatcher.embedded) == 1


async def test_sdk_lists_and_retrieves_models(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [CHAT_MODEL, EMBEDDING_MODEL, RERANK_MODEL]
    assert (await client.models.retrieve(CHAT_MODEL)).owned_by == "local"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ContextLengthExceeded.of(9, 5), openai.BadRequestError),
        (QueueFull("Full.", retry_after_s=1), openai.RateLimitError),
        (InsufficientMemory("No room."), openai.InternalServerError),
        (KeyError("bug"), openai.InternalServerError),
    ],
)
async def test_sdk_raises_its_own_class_for_each_error(
    client: openai.AsyncOpenAI,
    dispatcher: FakeDispatcher,
    error: Exception,
    expected: type[openai.APIStatusError],
) -> None:
    dispatcher.script = (error,)
    with pytest.raises(expected) as caught:
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}]
        )
    assert caught.value.code == getattr(error, "code", "internal_error")
    assert caught.value.request_id is not None


async def test_sdk_raises_for_wrong_key_and_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("org/nothing")
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()


async def test_sdk_raises_an_api_error_in_the_middle_of_a_stream_s3(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    dispatcher.script = (TextDelta("x"), EngineFailed("The engine died."))
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    texts = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="The engine died"):
        await read()
    assert texts == ["", "x"]
