"""The acceptor: no error of accept ends it, floods the log or makes it spin, on either loop."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop  # type: ignore[import-untyped, unused-ignore]

from core.supervision import RestartPolicy, Supervisor
from deployments.transport import acceptor as acceptor_module
from deployments.transport.acceptor import Acceptor, SocketLost
from tests.waiting import wait_until

FAST = RestartPolicy(first_delay_s=0.001, longest_delay_s=0.01, least_s=0.0)


class Greeter(asyncio.Protocol):
    """Sends a byte to each client."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"!")
        transport.close()


def listen(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


class FaultySocket(socket.socket):
    """Raises the given errors from accept, then works."""

    errors: list[int]
    calls: int

    @classmethod
    def listening(cls, *errors: int) -> "FaultySocket":
        found = cls(socket.AF_INET, socket.SOCK_STREAM)
        found.bind(("127.0.0.1", 0))
        found.listen(8)
        found.errors, found.calls = list(errors), 0
        return found

    def accept(self) -> Any:
        self.calls += 1
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


async def greeted(port: int) -> bool:
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 20)
    except ConnectionError:
        return False
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer == b"!"


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    """Run a test on asyncio's loop and on uvloop."""

    @pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
    def run(factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(acceptor_module, "_PAUSE_S", 0.01)
        monkeypatch.setattr(acceptor_module, "_CHECK_S", 0.01)
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(test())

    return run


@on_both_loops
async def test_connections_are_accepted_until_it_is_stopped() -> None:
    subject = Acceptor("listener", listen, Greeter)
    assert "does not listen" in subject.problem
    task = asyncio.ensure_future(subject.run())
    await wait_until(lambda: not subject.problem, "it listens")
    port = subject.address[1]
    for _ in range(3):
        assert await greeted(port)
    assert subject.accepted == 3
    await subject.stop()
    assert not await greeted(port)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await subject.stop()


def errors_that_pass(*errors: int) -> Callable[[], Coroutine[Any, Any, None]]:
    async def check() -> None:
        listener = FaultySocket.listening(*errors)
        subject = Acceptor("listener", listen, Greeter, listener)
        task = asyncio.ensure_future(subject.run())
        assert await greeted(listener.getsockname()[1])
        assert not subject.problem
        assert not task.done()
        # It did not spin: a call for each error, one for each connection, one that finds nothing.
        assert listener.calls <= len(errors) + 3
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    return check


test_it_waits_while_descriptors_are_exhausted = on_both_loops(
    errors_that_pass(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
)
test_errors_of_one_connection_are_skipped = on_both_loops(
    errors_that_pass(errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN)
)


@on_both_loops
async def test_real_exhaustion_of_descriptors_passes() -> None:
    import resource

    listener = listen()
    subject = Acceptor("listener", listen, Greeter, listener)
    task = asyncio.ensure_future(subject.run())
    port = subject.address[1]
    client = socket.socket()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(client.fileno() + 8, 64), hard))
        while True:
            try:
                held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        client.connect(("127.0.0.1", port))
        await wait_until(lambda: subject.is_paused, "it waits for descriptors")
        assert not task.done()
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await wait_until(lambda: subject.accepted == 1, "the waiting client is accepted")
    client.close()
    assert await greeted(port)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class SilentSocket(socket.socket):
    """Refuses to tell whether it listens, as macOS does, or fails with another error."""

    number = errno.ENOPROTOOPT
    asked = 0

    def getsockopt(self, *arguments: Any) -> Any:
        if arguments[:2] == (socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self.asked += 1
            raise OSError(self.number, os.strerror(self.number))
        return super().getsockopt(*arguments)


@on_both_loops
async def test_a_system_that_cannot_tell_whether_a_socket_listens_loses_none() -> None:
    listener = SilentSocket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)
    subject = Acceptor("listener", listen, Greeter, listener)
    task = asyncio.ensure_future(subject.run())
    assert await greeted(listener.getsockname()[1])
    assert subject.problem == ""
    before = listener.asked
    await wait_until(lambda: listener.asked > before + 2, "the socket is checked again")
    assert not task.done()
    assert await greeted(listener.getsockname()[1])
    listener.number = errno.EBADF
    assert "its socket is gone" in subject.problem
    with pytest.raises(SocketLost):
        await asyncio.wait_for(task, 20)


def close_descriptor(listener: socket.socket) -> None:
    os.close(listener.fileno())


def replace_descriptor(listener: socket.socket) -> None:
    with open(os.devnull) as other:
        os.dup2(other.fileno(), listener.fileno())


def shut_down(listener: socket.socket) -> None:
    listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("damage", [close_descriptor, replace_descriptor, shut_down])
@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_lost_socket_is_bound_again(
    damage: Callable[[socket.socket], None], factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor_module, "_CHECK_S", 0.01)

    async def check() -> None:
        first = listen()
        port = first.getsockname()[1]
        supervisor = Supervisor(FAST)
        subject = Acceptor("listener", lambda: listen(port), Greeter, first)
        supervisor.keep_running("listener", subject.run)
        assert await greeted(port)
        damage(first)
        assert subject.problem
        await wait_until(lambda: not subject.problem, "it listens again")
        assert await greeted(port)
        assert supervisor.parts()[0].failures == 1
        await supervisor.stop()
        assert not await greeted(port)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(check())


async def test_a_port_that_is_taken_meanwhile_is_tried_until_it_is_free() -> None:
    first = listen()
    port = first.getsockname()[1]
    supervisor = Supervisor(FAST)
    subject = Acceptor("listener", lambda: listen(port), Greeter, first)
    subject.close()
    with listen(port):
        supervisor.keep_running("listener", subject.run)
        await wait_until(
            lambda: supervisor.parts()[0].status == "failing", "it fails again and again"
        )
        assert "Address already in use" in supervisor.problems()[0]
    await wait_until(lambda: not subject.problem, "it has the port")
    assert await greeted(port)
    await supervisor.stop()


async def test_exhaustion_is_logged_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor_module, "_PAUSE_S", 0.001)
    listener = FaultySocket.listening(*[errno.EMFILE] * 20)
    subject = Acceptor("HTTP listener", listen, Greeter, listener)
    with caplog.at_level(logging.WARNING):
        task = asyncio.ensure_future(subject.run())
        assert await greeted(listener.getsockname()[1])
    assert caplog.text.count("the HTTP listener accepts no connections for now") == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_protocol_that_cannot_be_made_costs_only_its_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = 0

    def protocol() -> asyncio.Protocol:
        nonlocal made
        made += 1
        if made == 1:
            raise ValueError("no protocol")
        return Greeter()

    listener = listen()
    subject = Acceptor("listener", listen, protocol, listener)
    task = asyncio.ensure_future(subject.run())
    port = listener.getsockname()[1]
    assert not await greeted(port)
    assert await greeted(port)
    assert "no protocol" in caplog.text
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_running_without_a_supervisor_raises_what_was_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptor_module, "_CHECK_S", 0.01)
    listener = listen()
    subject = Acceptor("listener", listen, Greeter, listener)
    task = asyncio.ensure_future(subject.run())
    await wait_until(lambda: not subject.problem, "it listens")
    shut_down(listener)
    with pytest.raises(SocketLost):
        await asyncio.wait_for(task, 20)
