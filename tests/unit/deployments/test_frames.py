"""The event socket: order, boundaries, slow readers, lost peers."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.errors import EngineFailed
from core.types import Finished, GenerationEvent, TextDelta, Usage
from deployments import frames
from deployments.codec import encode_frame
from deployments.frames import FrameReceiver, FrameSender, Mailbox

END = Finished("stop", Usage(1, 1))


@pytest.fixture
async def receiver() -> AsyncIterator[FrameReceiver]:
    receiver = FrameReceiver()
    await receiver.start()
    yield receiver
    await receiver.stop()


async def read_to_end(mailbox: Mailbox) -> list[GenerationEvent]:
    events: list[GenerationEvent] = []
    while not events or events[-1] != END:
        events.extend(await mailbox.take())
    return events


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
    first, second = receiver.open("a"), receiver.open("b")
    sender = FrameSender(receiver.path)
    for index in range(200):
        sender.deliver([("a", [TextDelta(f"a{index}")]), ("b", [TextDelta(f"b{index}")])])
    sender.deliver([("a", [END]), ("b", [END])])
    assert await read_to_end(first) == [*(TextDelta(f"a{i}") for i in range(200)), END]
    assert await read_to_end(second) == [*(TextDelta(f"b{i}") for i in range(200)), END]
    sender.close()


async def test_events_of_forgotten_requests_are_dropped(receiver: FrameReceiver) -> None:
    receiver.open("gone")
    receiver.forget("gone")
    mailbox = receiver.open("here")
    sender = FrameSender(receiver.path)
    sender.deliver([("gone", [TextDelta("x")]), ("here", [END])])
    assert await read_to_end(mailbox) == [END]
    sender.close()


async def test_sender_keeps_what_the_socket_does_not_take(receiver: FrameReceiver) -> None:
    mailbox = receiver.open("a")
    sender = FrameSender(receiver.path)
    large = TextDelta("x" * 3_000_000)
    # The loop does not run between these, so the socket's buffer must overflow.
    sender.deliver([("a", [large])])
    sender.deliver([("a", [END])])
    assert not sender.flush()
    reading = asyncio.ensure_future(read_to_end(mailbox))
    while not sender.flush():
        await asyncio.sleep(0)
    assert await reading == [large, END]
    sender.close()


async def test_sender_gives_up_on_a_router_that_never_reads(
    receiver: FrameReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_MOST_UNSENT_BYTES", 100_000)
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
    mailbox = receiver.open("a")
    data = encode_frame([("a", [TextDelta("one")])]) + encode_frame([("a", [END])])
    _, writer = await asyncio.open_unix_connection(receiver.path)
    for byte in data:
        writer.write(bytes((byte,)))
        await writer.drain()
    assert await read_to_end(mailbox) == [TextDelta("one"), END]
    writer.close()
    await writer.wait_closed()


async def test_mailbox_fails_a_reader_that_falls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_MOST_UNREAD_EVENTS", 10)
    mailbox = Mailbox()
    for _ in range(20):
        mailbox.put([TextDelta("x")])
    assert len(await mailbox.take()) == 11
    with pytest.raises(EngineFailed, match="too slowly"):
        await mailbox.take()


async def test_mailbox_gives_what_came_before_a_failure() -> None:
    mailbox = Mailbox()
    mailbox.put([TextDelta("x")])
    mailbox.fail(EngineFailed("died"))
    assert await mailbox.take() == [TextDelta("x")]
    with pytest.raises(EngineFailed, match="died"):
        await mailbox.take()
