"""Event streams: chunks, keep-alives, errors after the headers, and clients that leave."""

import asyncio
import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from core.errors import EngineFailed
from core.types import (
    GenerationEvent,
    GenerationRequest,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    ToolCallDelta,
)
from router.answers import event_feed as feed_module
from router.answers.event_feed import EventFeed
from router.app import create_app
from router.context import Pacing
from router.services import EventCallback
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import client_of, connection, post_bytes, serving, sse_data

CHAT: dict[str, Any] = {
    "model": "tiny",
    "stream": True,
    "messages": [{"role": "user", "content": "hi"}],
}
AWKWARD = 'a\nb\r\n\u2028 "q" \\ 😀 \0 data: [DONE]\n\n'
QUICK = Pacing(
    header_wait_s=0.01, early_keep_alive_s=0.01, late_keep_alive_s=0.01, write_timeout_s=0.05
)
AT_ONCE = Pacing(header_wait_s=0.001)


APIS = [
    ("/v1/chat/completions", {**CHAT, "n": 2}),
    ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"model": "tiny", "prompt": "hi"}),
    ("/v1/responses", {"model": "tiny", "input": "hi"}),
    ("/v1/messages", {"model": "tiny", "max_tokens": 9, "messages": CHAT["messages"]}),
]


async def stream(
    dispatcher: FakeDispatcher, *, path: str = "/v1/chat/completions", **fields: Any
) -> list[Any]:
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post(path, json={**CHAT, **fields})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    return sse_data(response.text)


async def read_until(reader: asyncio.StreamReader, mark: bytes) -> bytes:
    text = b""
    while mark not in text:
        data = await asyncio.wait_for(reader.read(4096), 30)
        assert data, text
        text += data
    return text


async def test_stream_names_the_role_first_and_carries_text_exactly_s2() -> None:
    dispatcher = FakeDispatcher(TextDelta(AWKWARD), TextDelta(""), TextDelta(AWKWARD), finished())
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in await stream(dispatcher)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert [delta.content for delta in deltas[1:-1]] == [AWKWARD, AWKWARD]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert {(chunk.id, chunk.model) for chunk in chunks} == {
        (dispatcher.requests[0].id, CHAT_MODEL)
    }
    assert all(chunk.usage is None for chunk in chunks)


async def test_stream_ends_with_usage_when_asked() -> None:
    chunks = await stream(FakeDispatcher(), n=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    usage = ChatCompletionChunk.model_validate(chunks[-1]).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 4, 11)
    assert usage.prompt_tokens_details.cached_tokens == 3


async def test_stream_of_n_choices_keeps_them_apart_s4() -> None:
    dispatcher = FakeDispatcher()
    dispatcher.scripts = {
        str(index): (*(TextDelta(f"{index}.") for _ in range(50)), finished()) for index in range(8)
    }
    texts = dict.fromkeys(range(8), "")
    for chunk in await stream(dispatcher, n=8):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {index: f"{index}." * 50 for index in range(8)}


async def test_stream_carries_reasoning_tools_and_logprobs() -> None:
    token = TokenLogprob(1, b"x", -0.5, (TokenLogprob(2, b"y", -1.0),))
    dispatcher = FakeDispatcher(
        ReasoningDelta("hm"),
        TextDelta("x", (1,), (token,)),
        ToolCallDelta(0, "c1", "weather", "{"),
        ToolCallDelta(0, arguments="}"),
        finished("tool_calls"),
    )
    chunks = await stream(dispatcher, logprobs=True)
    choices = [ChatCompletionChunk.model_validate(chunk).choices[0] for chunk in chunks]
    assert choices[1].delta.model_extra == {"reasoning_content": "hm"}
    assert choices[2].logprobs is not None
    assert choices[2].logprobs.content is not None
    assert choices[2].logprobs.content[0].top_logprobs[0].token == "y"
    first, second = ((choice.delta.tool_calls or [])[0] for choice in choices[3:5])
    assert first.function is not None
    assert (first.id, first.type, first.function.name) == ("c1", "function", "weather")
    assert second.function is not None
    assert (second.index, second.id, second.function.arguments) == (0, None, "}")
    assert choices[-1].finish_reason == "tool_calls"


async def test_completion_stream_equals_the_whole_answer() -> None:
    token = TokenLogprob(1, b"x", -0.5)
    script = (TextDelta("ab"), TextDelta("x", (1,), (token,)), TextDelta("x"), finished("length"))
    fields: dict[str, Any] = {"prompt": "hi", "logprobs": 0}
    chunks = await stream(FakeDispatcher(*script), path="/v1/completions", **fields)
    async with client_of(create_app(make_services(FakeDispatcher(*script)))) as client:
        body = {"model": "tiny", **fields}
        whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"] == "abxx"
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "length"
    assert [choice["logprobs"] for choice in choices if choice["logprobs"]] == [whole["logprobs"]]


async def test_error_after_the_first_token_is_one_line_and_the_end_s3() -> None:
    dispatcher = FakeDispatcher(TextDelta("x"), EngineFailed("The engine died."))
    *_, last = await stream(dispatcher)
    assert last == EngineFailed("The engine died.").envelope()


async def test_bug_after_the_first_token_hides_its_details(
    caplog: pytest.LogCaptureFixture,
) -> None:
    *_, last = await stream(FakeDispatcher(TextDelta("x"), KeyError("secret detail")))
    assert last["error"]["message"].startswith("internal error, request id req_")
    assert [record.exc_info is not None for record in caplog.records if record.exc_info] == [True]


async def test_failure_of_one_choice_ends_the_others() -> None:
    dispatcher = FakeDispatcher()
    dispatcher.scripts = {
        "0": (TextDelta("x"), asyncio.Event()),
        "1": (TextDelta("y"), EngineFailed("The engine died.")),
    }
    *_, last = await stream(dispatcher, n=2)
    assert last["error"]["code"] == "engine_failed"
    assert dispatcher.running == 0


@pytest.mark.parametrize(("path", "fields"), APIS)
async def test_silence_is_filled_until_the_first_token_s2(
    path: str, fields: dict[str, Any]
) -> None:
    gate = asyncio.Event()
    dispatcher = FakeDispatcher(PrefillProgress(512, 4096), gate, TextDelta("x"), finished())
    async with (
        serving(create_app(make_services(dispatcher), pacing=QUICK)) as port,
        connection(port) as (reader, writer),
    ):
        writer.write(post_bytes(path, {**fields, "stream": True}))
        is_anthropic = path == "/v1/messages"
        head = await read_until(reader, b"event: ping\n" if is_anthropic else b": keep-alive\n\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b": prefill 512/4096\n\n" in head
        assert b"delta" not in head
        gate.set()
        assert b'"x"' in await read_until(reader, b"0\r\n\r\n")


async def test_error_after_the_headers_but_before_a_token_is_in_the_stream() -> None:
    gate = asyncio.Event()
    dispatcher = FakeDispatcher(gate, EngineFailed("No room after all."))
    async with (
        serving(create_app(make_services(dispatcher), pacing=QUICK)) as port,
        connection(port) as (reader, writer),
    ):
        writer.write(post_bytes("/v1/chat/completions", CHAT))
        assert (await read_until(reader, b": keep-alive")).startswith(b"HTTP/1.1 200")
        gate.set()
        rest = await read_until(reader, b"[DONE]")
    assert b'data: {"error":{"message":"No room after all."' in rest


@pytest.mark.parametrize("script", [(), (TextDelta("x"),), (PrefillProgress(1, 9),)])
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(("path", "fields"), APIS)
async def test_client_that_leaves_ends_the_generation(
    script: tuple[GenerationEvent, ...],
    path: str,
    fields: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    *,
    streams: bool,
) -> None:
    dispatcher = FakeDispatcher(*script, asyncio.Event())
    async with serving(create_app(make_services(dispatcher))) as port:
        async with connection(port) as (_, writer):
            asked = {key: fields[key] for key in fields if streams or key != "stream_options"}
            writer.write(post_bytes(path, {**asked, "stream": streams}))
            await asyncio.wait_for(dispatcher.began.wait(), 30)
        await asyncio.wait_for(dispatcher.idle.wait(), 30)
    assert dispatcher.running == 0
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_client_that_leaves_ends_the_embedding() -> None:
    dispatcher = FakeDispatcher()
    dispatcher.embed_gate = asyncio.Event()
    async with serving(create_app(make_services(dispatcher))) as port:
        async with connection(port) as (_, writer):
            writer.write(post_bytes("/v1/embeddings", {"model": "mini", "input": "x"}))
            await asyncio.wait_for(dispatcher.began.wait(), 30)
        await asyncio.wait_for(dispatcher.idle.wait(), 30)
    assert dispatcher.running == 0


async def test_handler_that_is_cancelled_closes_the_generation() -> None:
    dispatcher = FakeDispatcher(TextDelta("x"), asyncio.Event())
    app = create_app(make_services(dispatcher), pacing=AT_ONCE)
    async with client_of(app) as client:
        call = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await asyncio.wait_for(dispatcher.began.wait(), 30)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert dispatcher.running == 0


class EndlessDispatcher(FakeDispatcher):
    """Says large things without an end."""

    async def generate(self, request: GenerationRequest, on_events: EventCallback) -> None:
        del request
        self._enter()
        try:
            while True:
                self.played += 1
                on_events([TextDelta("x" * 10_000)])
                await asyncio.sleep(0)
        finally:
            self._leave()


async def test_client_that_never_reads_is_given_up_and_buffers_little_n15() -> None:
    dispatcher = EndlessDispatcher()
    async with (
        serving(create_app(make_services(dispatcher), pacing=QUICK)) as port,
        connection(port) as (_, writer),
    ):
        writer.write(post_bytes("/v1/chat/completions", CHAT))
        await asyncio.wait_for(dispatcher.began.wait(), 30)
        await asyncio.wait_for(dispatcher.idle.wait(), 30)
        played = dispatcher.played
    # What the kernel's buffers hold, and the 8,192 events that a feed holds at most.
    assert played < 8192 + 5000


async def test_feed_gives_up_a_reader_that_falls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_MAX_UNREAD_EVENTS", 10)
    gate = asyncio.Event()
    dispatcher = FakeDispatcher(*(TextDelta("x") for _ in range(11)), gate, finished())
    request = GenerationRequest("r", CHAT_MODEL, TextPrompt("x"))
    async with EventFeed(dispatcher.generate, [request], asyncio.Event().wait) as feed:  # type: ignore[arg-type]
        await asyncio.wait_for(dispatcher.idle.wait(), 30)
        events = await feed.next()
        assert events is not None
        assert len(events) == 11
        with pytest.raises(EngineFailed, match="too slowly"):
            await feed.next()


@pytest.mark.parametrize("is_begun", [True, False])
async def test_a_generation_that_is_cancelled_from_within_ends(is_begun: bool) -> None:
    async def generate(_: GenerationRequest, on_events: EventCallback) -> None:
        if is_begun:
            on_events([TextDelta("x")])
        raise asyncio.CancelledError

    request = GenerationRequest("r", CHAT_MODEL, TextPrompt("x"))
    async with EventFeed(generate, [request], asyncio.Event().wait) as feed:  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            if is_begun:
                assert await feed.next() == [(0, TextDelta("x"))]
            with pytest.raises(EngineFailed, match="cancelled"):
                await feed.next()


async def test_a_connection_that_cannot_be_watched_counts_as_gone() -> None:
    async def receive() -> Any:
        raise RuntimeError("bug")

    dispatcher = FakeDispatcher(asyncio.Event())
    request = GenerationRequest("r", CHAT_MODEL, TextPrompt("x"))
    async with asyncio.timeout(30), EventFeed(dispatcher.generate, [request], receive) as feed:
        assert await feed.next() is None
        assert feed.is_disconnected
    assert dispatcher.running == 0


async def test_events_that_wait_together_leave_in_one_message() -> None:
    dispatcher = FakeDispatcher(*(TextDelta(str(index)) for index in range(100)), finished())
    app = create_app(make_services(dispatcher))
    messages: list[Any] = []
    body = json.dumps(CHAT).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return requests.pop() if requests else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    bodies = [message["body"] for message in messages if message["type"] == "http.response.body"]
    assert len(bodies) == 1
    assert bodies[0].count(b"data: ") == 103
