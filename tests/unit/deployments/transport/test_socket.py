"""The event socket: order, boundaries, slow readers, lost peers."""

import asyncio
import os
import shutil
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from core.errors import EngineFailed
from core.supervision import RestartPolicy, Supervisor
from core.types import Finished, GenerationEvent, TextDelta, Usage
from deployments.transport import handle_stream
from deployments.transport import socket as frames
from deployments.transport.codec import decode_body, encode_frame
from deployments.transport.handle_stream import CoalescingReceiver
from deployments.transport.socket import FrameReceiver, FrameSender
from tests.waiting import wait_until

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


class Lost:
    """Events and errors of requests."""

    def __init__(self, receiver: FrameReceiver, *request_ids: str) -> None:
        self.events: dict[str, list[GenerationEvent]] = {name: [] for name in request_ids}
        self.errors: dict[str, list[Exception]] = {name: [] for name in request_ids}
        for name in request_ids:
            receiver.subscribe(name, self.events[name].extend, self.errors[name].append)


async def write(receiver: FrameReceiver, *parts: bytes) -> asyncio.StreamWriter:
    """Return a connection to which `parts` were written."""
    _, writer = await asyncio.open_unix_connection(receiver.path)
    writer.writelines(parts)
    await writer.drain()
    return writer


async def until_read(receiver: FrameReceiver) -> None:
    """Wait until everything written before has been handled: a later connection was."""
    taken = Taken(receiver, "last")
    writer = await write(receiver, encode_frame([("last", [END])]))
    async with asyncio.timeout(30):
        await taken.to_end()
    writer.close()


async def test_a_bad_event_ends_its_request_only(receiver: FrameReceiver) -> None:
    lost = Lost(receiver, "a", "b")
    sender = FrameSender(receiver.path)
    sender.deliver([("a", [TextDelta("x")]), ("b", [object()])])  # type: ignore[list-item]
    sender.deliver([("a", [END]), ("b", [END])])
    await until_read(receiver)
    assert lost.events == {"a": [TextDelta("x"), END], "b": []}
    assert [type(error) for error in lost.errors["b"]] == [EngineFailed]
    assert not lost.errors["a"]
    assert not sender.is_broken
    sender.close()


async def test_a_callback_that_raises_ends_its_request_only(receiver: FrameReceiver) -> None:
    lost = Lost(receiver, "a")
    errors: list[Exception] = []

    def fail(_: object) -> None:
        raise KeyError("bug")

    def note(problem: Exception) -> None:
        errors.append(problem)
        raise RuntimeError("another bug")

    receiver.subscribe("b", fail, note)
    receiver.subscribe("c", fail)
    sender = FrameSender(receiver.path)
    for _ in range(2):
        sender.deliver([("c", [END]), ("b", [END]), ("a", [TextDelta("x")])])
    await until_read(receiver)
    assert lost.events["a"] == [TextDelta("x")] * 2
    assert [type(error) for error in errors] == [KeyError]
    sender.close()


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\xff\xff\xff", b"\x03\0\0\0\xc1\xc1\xc1", b"\x01\0\0\0\x05", b"\0\0\0\0",
     b"\x03\0\0\0\x91\x92\x01", b"\x04\0\0\0\x91\x92\x01\x90"],
)  # fmt: skip
async def test_garbage_ends_the_requests_of_its_connection_only(
    receiver: FrameReceiver, garbage: bytes
) -> None:
    lost = Lost(receiver, "a", "b")
    sender = FrameSender(receiver.path)
    sender.deliver([("b", [TextDelta("x")])])
    writer = await write(
        receiver, encode_frame([("a", [TextDelta("x")])]), garbage, encode_frame([("a", [END])])
    )
    await until_read(receiver)
    assert lost.events["a"] == [TextDelta("x")]
    assert ["broke" in str(error) for error in lost.errors["a"]] == [True]
    sender.deliver([("b", [END])])
    await until_read(receiver)
    assert lost.events["b"] == [TextDelta("x"), END]
    assert not lost.errors["b"]
    writer.close()
    sender.close()


async def test_half_a_frame_and_the_end_leave_the_others_alone(receiver: FrameReceiver) -> None:
    lost = Lost(receiver, "a", "b")
    frame = encode_frame([("a", [END])])
    for length in (1, 4, len(frame) - 1):
        writer = await write(receiver, frame[:length])
        writer.close()
        await writer.wait_closed()
    await until_read(receiver)
    sender = FrameSender(receiver.path)
    sender.deliver([("b", [END])])
    await until_read(receiver)
    assert lost.events == {"a": [], "b": [END]}
    sender.close()


async def test_an_answer_larger_than_the_old_backlog_breaks_nothing(
    receiver: FrameReceiver,
) -> None:
    taken, other = Taken(receiver, "a"), Taken(receiver, "b")
    sender = FrameSender(receiver.path)
    # As a long prompt that is echoed.
    large = TextDelta("x" * 40_000_000)
    sender.deliver([("a", [large]), ("b", [TextDelta("y")])])
    sender.deliver([("a", [END]), ("b", [END])])
    assert not sender.is_broken
    reading = asyncio.gather(taken.to_end(), other.to_end())
    while not sender.flush():
        await asyncio.sleep(0)
    assert list(await reading) == [[large, END], [TextDelta("y"), END]]
    sender.close()


async def test_sender_gives_up_on_a_router_that_stopped_reading(
    receiver: FrameReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_MAX_STALLED_BYTES", 1_000_000)
    sender = FrameSender(receiver.path)
    sender.deliver([("a", [TextDelta("x" * 5_000_000)])])
    assert not sender.is_broken
    monkeypatch.setattr(frames, "_STALL_S", -1.0)
    sender.deliver([("a", [TextDelta("x")])])
    assert sender.is_broken


async def test_a_watcher_that_raises_does_not_hurt_the_sender(receiver: FrameReceiver) -> None:
    sender = FrameSender(receiver.path)
    seen: list[str] = []

    def fail() -> None:
        raise RuntimeError("the loop is closed")

    with sender.watched(fail), sender.watched(lambda: seen.append("broken")):
        await receiver.stop()
        await asyncio.sleep(0)
        sender.deliver([("a", [END])])
        sender.deliver([("a", [END])])
        sender.deliver([("a", [END])])
    assert seen == ["broken"]


async def test_frames_for_another_node_survive_a_bad_event_and_a_closed_loop() -> None:
    receiver = CoalescingReceiver(asyncio.get_running_loop())
    receiver.deliver([("a", [TextDelta("x"), object()])])  # type: ignore[list-item]
    receiver.end()
    arrivals = [one async for frame in receiver.frames() for one in decode_body(frame[4:])]
    assert arrivals[0] == ("a", [TextDelta("x")])
    assert isinstance(arrivals[1][1], EngineFailed)
    loop = asyncio.new_event_loop()
    loop.close()
    CoalescingReceiver(loop).deliver([("a", [END])])


async def test_a_folder_that_was_removed_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.transport.socket._CHECK_S", 0.01)
    supervisor = Supervisor(RestartPolicy(first_delay_s=0.001))
    receiver = FrameReceiver()
    assert "does not listen" in receiver.problem
    await receiver.start(supervisor)
    await wait_until(lambda: not receiver.problem, "it listens")
    events: list[Any] = []
    receiver.subscribe("a", events.extend)
    old, before = FrameSender(receiver.path), receiver.path
    old.deliver([("a", [END])])
    await wait_until(lambda: events, "the first replica is heard")
    shutil.rmtree(Path(before).parent)
    assert "was removed" in receiver.problem
    await wait_until(lambda: not receiver.problem, "it listens again")
    assert receiver.path != before
    new = FrameSender(receiver.path)
    # A replica that was connected is still heard, a new one as well.
    for sender in (old, new):
        events.clear()
        sender.deliver([("a", [END])])
        await wait_until(lambda: events, "the replica is heard")
        sender.close()
    assert supervisor.parts()[0].failures == 1
    await receiver.stop()
    assert not Path(receiver.path).parent.exists()
    await supervisor.stop()


async def test_a_router_on_another_node_that_falls_behind_loses_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handle_stream, "_MAX_WAITING_STEPS", 5)
    receiver = CoalescingReceiver(asyncio.get_running_loop())
    for _ in range(20):
        receiver.deliver([("a", [TextDelta("x")])])
    await asyncio.sleep(0)
    arrivals = [one async for frame in receiver.frames() for one in decode_body(frame[4:])]
    assert arrivals[:-1] == [("a", [TextDelta("x")])] * 5
    assert isinstance(arrivals[-1][1], EngineFailed)
