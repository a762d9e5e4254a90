"""Tokens written at once where nothing must be waited for: same bytes, order and errors."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import pytest

from core.types import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)
from router.answers import event_stream as sse
from router.app import create_app
from router.http.direct_writer import DirectWriter
from router.services import EventCallback
from router.v1.chunks import ChunkFormatter
from tests.fakes import FakeDispatcher, finished, make_services
from tests.live_server import connection, post_bytes, serving

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}
APIS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "logprobs": True}),
    ("/v1/completions", {"model": "tiny", "prompt": "hi"}),
    ("/v1/responses", {"model": "tiny", "input": "hi"}),
    ("/v1/messages", {"model": "tiny", "max_tokens": 9, "messages": MESSAGES}),
]
EVENTS: Sequence[GenerationEvent] = (
    ReasoningDelta("why"),
    PrefillProgress(5, 9),
    TextDelta("a"),
    TextDelta(""),
    TextDelta('"\u2028😀'),
    ToolCallDelta(0, "call_1", "f", ""),
    ToolCallDelta(0, None, None, "{}"),
)
_CHANGING = re.compile(
    rb'"(?:id|created|created_at|completed_at|item_id)":(?:"[^"]*"|[\d.]+)|"timing":\{[^}]*\}'
)


class HandFed(FakeDispatcher):
    """Gives what the test says, when it says it; an end ends the generation."""

    def __init__(self) -> None:
        super().__init__()
        self.on_events: asyncio.Future[EventCallback] = asyncio.get_running_loop().create_future()
        self._end = asyncio.Event()

    async def generate(self, request: GenerationRequest, on_events: EventCallback) -> None:
        self.requests.append(request)
        self.on_events.set_result(on_events)
        await self._end.wait()

    def end(self, on_events: EventCallback, event: Finished) -> None:
        on_events([event])
        self._end.set()


class Stream:
    """One client's stream, of a generation that is fed by hand."""

    def __init__(
        self, dispatcher: HandFed, reader: asyncio.StreamReader, on_events: EventCallback
    ) -> None:
        self._dispatcher = dispatcher
        self.reader = reader
        self.on_events = on_events

    async def until(self, mark: bytes) -> None:
        text = b""
        while mark not in text:
            text += await asyncio.wait_for(self.reader.read(65536), 30)

    async def rest(self) -> bytes:
        """End the generation and return all that was not read."""
        self._dispatcher.end(self.on_events, finished())
        return await self.to_end()

    async def to_end(self) -> bytes:
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            text += await asyncio.wait_for(self.reader.read(65536), 30)
        return text


@asynccontextmanager
async def streaming(path: str, body: dict[str, Any]) -> AsyncIterator[Stream]:
    dispatcher = HandFed()
    async with (
        serving(create_app(make_services(dispatcher))) as port,
        connection(port) as (reader, writer),
    ):
        writer.write(post_bytes(path, {**body, "stream": True}))
        on_events = await asyncio.wait_for(dispatcher.on_events, 30)
        yield Stream(dispatcher, reader, on_events)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was written at once."""
    written: list[bytes] = []
    write = DirectWriter.write

    def note(self: DirectWriter, body: bytes) -> None:
        written.append(body)
        write(self, body)

    monkeypatch.setattr(DirectWriter, "write", note)
    return written


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def begin(stream: Stream) -> None:
    """Send the first token and wait until the client has it."""
    stream.on_events([TextDelta("first")])
    await stream.until(b"first")
    await settle()


async def test_a_token_is_written_before_the_callback_returns(pieces: list[bytes]) -> None:
    async with streaming("/v1/chat/completions", CHAT) as stream:
        await begin(stream)
        assert pieces == []
        stream.on_events([TextDelta("b")])
        assert len(pieces) == 1
        assert b'"content":"b"' in pieces[0]
        text = await stream.rest()
    assert text.index(b'"content":"b"') < text.index(b'"finish_reason":"stop"')
    assert len(pieces) == 1


@pytest.mark.parametrize(("path", "body"), APIS)
async def test_the_bytes_are_those_of_the_other_way(
    path: str, body: dict[str, Any], pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for _ in range(2):
        async with streaming(path, body) as stream:
            await begin(stream)
            for event in EVENTS:
                if path == "/v1/completions" and not isinstance(event, TextDelta):
                    continue
                stream.on_events([event])
                await settle()
            texts.append(_CHANGING.sub(b"", await stream.rest()))
        monkeypatch.setattr(sse, "direct_writer", Mock(return_value=None))
    assert pieces
    assert _without_sizes(texts[0]) == _without_sizes(texts[1])


async def test_events_before_the_reader_waits_again_keep_their_order(pieces: list[bytes]) -> None:
    async with streaming("/v1/completions", {"model": "tiny", "prompt": "hi"}) as stream:
        for index in range(5):
            stream.on_events([TextDelta(f"<{index}>")])
        assert pieces == []
        await begin(stream)
        stream.on_events([TextDelta("<5>"), TextDelta("<6>")])
        text = await stream.rest()
    assert len(pieces) == 1
    assert re.findall(rb"<(\d)>", text) == [b"5", b"6"]


async def test_a_client_that_does_not_read_gets_everything_in_order_later(
    pieces: list[bytes],
) -> None:
    async with streaming("/v1/chat/completions", CHAT) as stream:
        await begin(stream)
        for index in range(200):
            stream.on_events([TextDelta(f"<{index}>" + "x" * 20_000)])
        assert 0 < len(pieces) < 200
        text = await stream.rest()
    assert [int(number) for number in re.findall(rb"<(\d+)>", text)] == list(range(200))


async def test_a_failure_while_writing_is_said_in_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with streaming("/v1/chat/completions", CHAT) as stream:
        await begin(stream)
        monkeypatch.setattr(ChunkFormatter, "chunks", Mock(side_effect=RuntimeError("no text")))
        stream.on_events([TextDelta("b")])
        text = await stream.to_end()
    assert b"internal_error" in text
    assert b"no text" not in text


def _without_sizes(text: bytes) -> bytes:
    """Take the chunks' sizes out, which differ where ids and times were taken out."""
    return re.sub(rb"\r\n[0-9a-f]+\r\n", b"", text)
