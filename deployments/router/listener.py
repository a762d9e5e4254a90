"""The router's HTTP listener: one socket and one uvicorn server in the replica's event loop."""

import asyncio
import errno
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from catalog.key_store import has_stored_keys
from core.errors import ImpetusError, Unavailable
from core.settings import Settings
from core.supervision import Supervisor
from deployments.router.port_use import answering_address, listener_name
from deployments.transport.acceptor import EXHAUSTED, Acceptor
from router.http.protocol import HttpProtocol

_BACKLOG = 512
_KEEP_ALIVE_S = 75
_DRAIN_S = 5
_UNWIND_S = 1.0
_PROBE_LIMIT_S = 2.0
_PROBE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class PortInUse(ImpetusError):
    """Another process listens on the port."""

    code = "port_in_use"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.  Raises PortInUse, or ImpetusError for an unusable address.

    The port is in use, too, if another program already answers there.
    """
    try:
        # Whether the address is ours, before anything is asked there.
        _bound(host, port).close()
        if (answering := answering_address(host, port)) is not None:
            raise _in_use(answering, port)
        listener = _bound(host, port)
        listener.listen(_BACKLOG)
        return listener
    except UnicodeError as problem:
        raise ImpetusError(f"IMPETUS_HOST: {host!r} is not a valid host name.") from problem
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise _in_use(host, port) from problem
        raise ImpetusError(f"Cannot listen on {host}:{port}: {problem.strerror}.") from problem


def _in_use(host: str, port: int) -> PortInUse:
    name = listener_name(port)
    by, program = (f" by {name}", "it") if name else ("", "the program that uses it")
    return PortInUse(
        f"Port {port} on {host} is in use{by}. Stop {program}, or choose another port with "
        "IMPETUS_PORT."
    )


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # A restarted router must get the port although old connections are in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except BaseException:
        listener.close()
        raise
    return listener


def check_exposure(settings: Settings) -> None:
    """Raise ImpetusError if other machines could connect without an API key.

    Also if the stored keys cannot be read: without them nobody could tell who may connect.
    """
    has_keys = has_stored_keys(settings.key_database)
    if settings.is_public and settings.api_key is None and not has_keys:
        raise ImpetusError(
            f"IMPETUS_HOST={settings.host} accepts other machines, but no API key is set. Create "
            "one with scripts/keys or set IMPETUS_API_KEY, or listen on 127.0.0.1, or put a proxy "
            "with a key in front."
        )


class Listener:
    """Serves an ASGI application on the configured address until stopped."""

    def __init__(self, app: ASGIApp, settings: Settings, *, drain_s: int = _DRAIN_S) -> None:
        """Bind the port; clients wait until `start`.

        `drain_s` is the grace period for running requests after `stop`, in seconds.  Raises
        PortInUse, or ImpetusError for an address that is refused.
        """
        check_exposure(settings)
        self._socket = bind(settings.host, settings.port)
        self._settings = settings
        config = uvicorn.Config(
            app,
            loop="none",
            http=HttpProtocol,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=drain_s,
        )
        self._server = _Server(config)
        self._acceptor = Acceptor(
            "HTTP listener", self._bind, self._server.new_connection, self._socket
        )
        self._tasks: list[asyncio.Task[None]] = []

    def _bind(self) -> socket.socket:
        return bind(self._settings.host, self._settings.port)

    def start(self, supervisor: Supervisor | None = None) -> None:
        """Start serving on the running loop.

        A listening socket that is lost is bound again by the supervisor; open connections go on.
        """
        supervisor = supervisor or Supervisor()
        self._server.prepare()
        self._tasks = [
            supervisor.run_until_done("HTTP server", self._server.serve),
            supervisor.keep_running("HTTP listener", self._acceptor.run),
        ]

    async def stop(self) -> None:
        """Stop accepting, let running requests finish within the grace period, then close."""
        await self._acceptor.stop()
        self._server.stop()
        if self._tasks:
            serving, accepting = self._tasks
            accepting.cancel()
            await asyncio.wait([serving, accepting])
        await self._server.abandon()

    @property
    def problem(self) -> str:
        """Why no connection would be accepted, as a sentence; empty if one would."""
        reason = self._acceptor.problem
        return f"The HTTP listener does not work: {reason}." if reason else ""

    async def check_answers(self, limit_s: float = _PROBE_LIMIT_S) -> None:
        """Raise Unavailable if a client on this machine would get no answer.

        Sends a request to itself, unless another client was accepted lately.  Exhausted
        descriptors count as an answer: they are no fault of the listener and pass.
        """
        if reason := self.problem:
            raise Unavailable(reason)
        is_fresh = time.monotonic() - self._acceptor.accepted_at < limit_s
        if is_fresh or self._acceptor.is_paused:
            return
        try:
            async with asyncio.timeout(limit_s):
                await self._ask_itself()
        except TimeoutError as problem:
            if not self._acceptor.is_paused:
                raise Unavailable(
                    f"The HTTP listener did not answer its own request within {limit_s:g} s."
                ) from problem
        except OSError as problem:
            if problem.errno in EXHAUSTED:
                return
            raise Unavailable(
                f"The HTTP listener did not answer its own request: {problem.strerror or problem}."
            ) from problem

    async def _ask_itself(self) -> None:
        host, port = _reachable(self._acceptor.address)
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(_PROBE)
            if not (await reader.read(16)).startswith(b"HTTP/1."):
                raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        finally:
            writer.transport.abort()


def _reachable(address: tuple[str, int]) -> tuple[str, int]:
    """Return the address under which this machine reaches a socket bound to `address`."""
    host, port = address[:2]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers and without sockets: `Acceptor` has the socket.

    Source: uvicorn 0.54, `Server._serve`: startup, main_loop, shutdown.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._exit = asyncio.Event()
        self.servers: list[asyncio.base_events.Server] = []

    def prepare(self) -> None:
        """Load the application, so that connections can be accepted."""
        if not self.config.loaded:
            self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)

    def new_connection(self) -> asyncio.Protocol:
        """Return the protocol of a new connection."""
        return HttpProtocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on nothing."""
        del sockets
        self.started = True

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Install no handlers: Ray handles the signals."""
        yield

    async def main_loop(self) -> None:
        """Tick once a second for the Date header instead of ten times; `stop` ends the wait."""
        await self.on_tick(0)
        while not self.should_exit:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._exit.wait(), 1.0)
            await self.on_tick(0)

    def stop(self) -> None:
        """Stop accepting; `serve` returns when the running requests have finished."""
        self.should_exit = True
        self._exit.set()

    async def abandon(self) -> None:
        """Wait briefly for cancelled requests to unwind, then abort open connections."""
        if self.server_state.tasks:
            await asyncio.wait(list(self.server_state.tasks), timeout=_UNWIND_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
