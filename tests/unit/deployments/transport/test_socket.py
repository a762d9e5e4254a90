"""The event socket: order, boundaries, slow readers, lost peers."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from core.types import Finished, GenerationEvent, TextDelta, Usage
from deployments.transport import socket as frames
from deployments.transport.codec import encode_frame
from deployments.transport.socket import FrameReceiver, FrameSender

END = Finished("stop", Usage(1, 1))


@pytest.fixture
async def receiver() -> AsyncIterator[FrameReceiver]:
    receiver = FrameReceiver()
    await receiver.start()
    yield receiver
    await receiver.stop()


class Taken:
    """What came for one request."""

    def __init__(self, receiver: FrameReceiver, request_id: str) -> None:
        self.events: list[GenerationEvent] = []
        self._has_end = asyncio.Event()
        receiver.subscribe(request_id, self._on_events)

    def _on_events(self, events: Sequence[GenerationEvent]) -> None:
        self.events.extend(events)
        if END in events:
            self._has_end.set()

    async def to_end(self) -> list[GenerationEvent]:
        await self._has_end.wait()
        return self.events


async def test_socket_lies_in_a_private_folder_with_a_short_path(receiver: FrameReceiver) -> None:
    folder = Path(receiver.path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(os.fsencode(receiver.path)) < 100


async def test_stop_removes_the_folder() -> None:
    receiver = FrameReceiver()
    await receiver.start()
    folder = Path(receiver.path).parent
    await receiver.stop()
    await receiver.stop()
    assert not folder.exists()


async def test_events_reach_their_mailboxes_in_order(receiver: FrameReceiver) -> None:
    first, second = Taken(receiver, "a"), Taken(receiver, "b")
    sender = FrameSender(receiver.path)
    for index in range(200):
        sender.deliver([("a", [TextDelta(f"a{index}")]), ("b", [TextDelta(f"b{index}")])])
    sender.deliver([("a", [END]), ("b", [END])])
    assert await first.to_end() == [*(TextDelta(f"a{i}") for i in range(200)), END]
    assert await second.to_end() == [*(TextDelta(f"b{i}") for i in range(200)), END]
    sender.close()


async def test_events_of_forgotten_requests_are_dropped(receiver: FrameReceiver) -> None:
    gone = Taken(receiver, "gone")
    receiver.unsubscribe("gone")
    taken = Taken(receiver, "here")
    sender = FrameSender(receiver.path)
    sender.deliver([("gone", [TextDelta("x")]), ("here", [END])])
    assert await taken.to_end() == [END]
    assert gone.events == []
    sender.close()


async def test_sender_keeps_what_the_socket_does_not_take(receiver: FrameReceiver) -> None:
    taken = Taken(receiver, "a")
    sender = FrameSender(receiver.path)
    large = TextDelta("x" * 3_000_000)
    # The loop does not run between these, so the socket's buffer must overflow.
    sender.deliver([("a", [large])])
    sender.deliver([("a", [END])])
    assert not sender.flush()
    reading = asyncio.ensure_future(taken.to_end())
    while not sender.flush():
        await asyncio.sleep(0)
    assert await reading == [large, END]
    sender.close()


async def test_sender_gives_up_on_a_router_that_never_reads(
    receiver: FrameReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_MAX_UNSENT_BYTES", 100_000)
    sender = FrameSender(receiver.path)
    for _ in range(100):
        sender.deliver([("a", [TextDelta("x" * 10_000)])])
    assert sender.is_broken
    assert sender.flush()


async def test_sender_notices_a_router_that_is_gone(receiver: FrameReceiver) -> None:
    sender = FrameSender(receiver.path)
    await receiver.stop()
    await asyncio.sleep(0)
    sender.deliver([("a", [END])])
    sender.deliver([("a", [END])])
    assert sender.is_broken


async def test_frames_cut_anywhere_are_joined(receiver: FrameReceiver) -> None:
    taken = Taken(receiver, "a")
    data = encode_frame([("a", [TextDelta("one")])]) + encode_frame([("a", [END])])
    _, writer = await asyncio.open_unix_connection(receiver.path)
    for byte in data:
        writer.write(bytes((byte,)))
        await writer.drain()
    assert await taken.to_end() == [TextDelta("one"), END]
    writer.close()
    await writer.wait_closed()
