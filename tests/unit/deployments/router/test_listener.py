"""The listener: which addresses it takes, what it refuses, and how it ends."""

import asyncio
import errno
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from catalog.key_store import KeyStore
from core.errors import ImpetusError, Unavailable
from core.settings import Settings
from core.supervision import RestartPolicy, Supervisor
from deployments.router.listener import Listener, PortInUse, bind, check_exposure
from router.http.protocol import MAX_TARGET_BYTES
from tests.live_server import connection, exchange, free_port
from tests.waiting import wait_until

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class App:
    """Begins its answer, and ends it when the gate opens."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.gate = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begin", "more_body": True})
        self.began.set()
        await self.gate.wait()
        await send({"type": "http.response.body", "body": b"end"})


def settings_of(port: int | None = None, **changes: Any) -> Settings:
    return Settings(port=port or free_port(), **changes)


async def accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_port_in_use_is_named_with_the_setting_that_changes_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(PortInUse) as caught:
            Listener(App(), settings_of(port))
    message = str(caught.value)
    assert str(port) in message
    assert "IMPETUS_PORT" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "2001:db8::1", "no-such-host.invalid", "a..b", "x" * 300, "fe80::zz"]
)
def test_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(ImpetusError, match="Cannot listen on") as caught:
        bind(host, free_port())
    message = str(caught.value)
    assert host in message
    assert "\n" not in message
    assert not isinstance(caught.value, PortInUse)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "mac.local", "192.168.0.7"])
def test_public_address_needs_a_key_n2(host: str) -> None:
    with pytest.raises(ImpetusError, match="IMPETUS_API_KEY"):
        check_exposure(settings_of(host=host))
    check_exposure(settings_of(host=host, api_key="secret"))


def test_a_stored_key_is_enough_for_another_address_and_a_damaged_file_is_not(
    tmp_path: Path,
) -> None:
    settings = Settings(home=tmp_path, host="0.0.0.0")
    store = KeyStore(settings.key_database)
    with pytest.raises(ImpetusError, match="scripts/keys"):
        check_exposure(settings)
    store.create("one", ["inference"], now=1.0)
    check_exposure(settings)
    store.close()
    settings.key_database.write_bytes(b"damaged" * 1000)
    with pytest.raises(ImpetusError, match="cannot be opened"):
        check_exposure(Settings(home=tmp_path))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(settings_of(host=host))


async def test_public_address_without_a_key_takes_no_port_n2() -> None:
    settings = settings_of(host="0.0.0.0")
    with pytest.raises(ImpetusError, match="IMPETUS_API_KEY"):
        Listener(App(), settings)
    assert not await accepts(settings.port)


async def test_public_address_with_a_key_is_served() -> None:
    settings = settings_of(host="0.0.0.0", api_key="secret")
    app = App()
    app.gate.set()
    listener = Listener(app, settings)
    listener.start()
    async with connection(settings.port) as (reader, writer):
        writer.write(GET)
        await asyncio.wait_for(reader.readuntil(b"end"), 30)
    await listener.stop()


async def test_request_is_refused_in_the_envelope() -> None:
    settings = settings_of()
    listener = Listener(App(), settings)
    listener.start()
    status, answer = await exchange(settings.port, b"GET /" + b"a" * MAX_TARGET_BYTES)
    await listener.stop()
    assert status == 414
    assert b'"code":"invalid_request"' in answer


async def test_port_can_be_taken_again_right_after_stop_with_clients_connected() -> None:
    settings = settings_of()
    app = App()
    app.gate.set()
    for _ in range(3):
        listener = Listener(app, settings)
        listener.start()
        async with connection(settings.port) as (reader, writer), connection(settings.port):
            writer.write(GET)
            await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 30)
            await listener.stop()
            assert await asyncio.wait_for(reader.read(), 30) == b""
            Listener(app, settings)._socket.close()
    assert not await accepts(settings.port)


async def test_stop_lets_a_running_request_end_and_takes_no_new_one() -> None:
    settings = settings_of()
    app = App()
    listener = Listener(app, settings)
    listener.start()
    async with connection(settings.port) as (reader, writer):
        writer.write(GET)
        await asyncio.wait_for(app.began.wait(), 30)
        stopping = asyncio.create_task(listener.stop())
        while await accepts(settings.port):
            assert not stopping.done()
        app.gate.set()
        await asyncio.wait_for(reader.readuntil(b"end"), 30)
        await asyncio.wait_for(stopping, 5)


async def test_stop_cuts_a_request_that_outlives_the_limit() -> None:
    settings = settings_of()
    app = App()
    listener = Listener(app, settings, drain_s=0)
    listener.start()
    async with connection(settings.port) as (reader, writer):
        writer.write(GET)
        await asyncio.wait_for(app.began.wait(), 30)
        await asyncio.wait_for(listener.stop(), 5)
        assert b"end" not in await asyncio.wait_for(reader.read(), 30)


async def test_stop_before_start_frees_the_port() -> None:
    settings = settings_of()
    listener = Listener(App(), settings)
    await listener.stop()
    bind("127.0.0.1", settings.port).close()


async def test_signals_are_left_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    settings = settings_of()
    app = App()
    app.gate.set()
    listener = Listener(app, settings)
    listener.start()
    async with connection(settings.port) as (reader, writer):
        writer.write(GET)
        await asyncio.wait_for(reader.readuntil(b"end"), 30)
        during = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    await listener.stop()
    assert during == before


async def test_a_lost_socket_is_bound_again_and_streams_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.transport.acceptor._CHECK_S", 0.01)
    settings = settings_of()
    app = App()
    listener = Listener(app, settings)
    supervisor = Supervisor(RestartPolicy(first_delay_s=0.001))
    listener.start(supervisor)
    async with connection(settings.port) as (reader, writer):
        writer.write(GET)
        await asyncio.wait_for(app.began.wait(), 30)
        await listener.check_answers()
        listener._socket.close()
        assert "does not work" in listener.problem
        with pytest.raises(Unavailable, match="does not work"):
            await listener.check_answers()
        await wait_until(lambda: not listener.problem, "it listens again")
        assert await accepts(settings.port)
        app.gate.set()
        await asyncio.wait_for(reader.readuntil(b"end"), 30)
    await listener.check_answers()
    await listener.stop()
    assert not await accepts(settings.port)
    await supervisor.stop()


async def test_a_deaf_listener_fails_the_health_check() -> None:
    settings = settings_of()
    app = App()
    app.gate.set()
    listener = Listener(app, settings)
    listener.start()
    await wait_until(lambda: not listener.problem, "it listens")
    await listener.check_answers()
    assert listener._acceptor.accepted == 1
    # The socket listens and the task lives, but nobody accepts: only a request shows that.
    listener._acceptor.accepted_at = float("-inf")
    listener._acceptor._stop_reading()
    assert listener.problem == ""
    with pytest.raises(Unavailable, match=r"own request within 0\.05 s"):
        await listener.check_answers(0.05)
    await listener.stop()


@pytest.mark.parametrize("answer", [b"", b"nonsense"])
async def test_a_listener_that_closes_connections_fails_the_health_check(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closes(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.WriteTransport)
            transport.write(answer)
            transport.close()

    settings = settings_of()
    listener = Listener(App(), settings)
    monkeypatch.setattr(listener._acceptor, "_protocol", Closes)
    listener.start()
    await wait_until(lambda: not listener.problem, "it listens")
    with pytest.raises(Unavailable, match="own request"):
        await listener.check_answers()
    await listener.stop()


async def test_a_busy_listener_is_not_asked_and_exhausted_descriptors_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of()
    app = App()
    app.gate.set()
    listener = Listener(app, settings)
    listener.start()
    assert await accepts(settings.port)
    await wait_until(lambda: listener._acceptor.accepted == 1, "the client is accepted")
    await listener.check_answers(30.0)
    assert listener._acceptor.accepted == 1

    async def exhausted(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    listener._acceptor.accepted_at = float("-inf")
    monkeypatch.setattr(asyncio, "open_connection", exhausted)
    await listener.check_answers()
    await listener.stop()


@pytest.mark.parametrize(
    ("host", "key"), [("0.0.0.0", "secret"), ("::1", None), ("localhost", None)]
)
async def test_it_reaches_itself_on_every_address(host: str, key: str | None) -> None:
    app = App()
    app.gate.set()
    try:
        listener = Listener(app, settings_of(host=host, api_key=key))
    except ImpetusError:
        pytest.skip("this machine has no such address")
    listener.start()
    await wait_until(lambda: not listener.problem, "it listens")
    await listener.check_answers()
    assert listener._acceptor.accepted == 1
    await listener.stop()
