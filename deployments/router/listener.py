"""The router's HTTP listener: one socket and one uvicorn server in the replica's event loop."""

import asyncio
import errno
import logging
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from core.errors import ImpetusError
from core.settings import Settings
from router.http.protocol import HttpProtocol

_logger = logging.getLogger(__name__)

_BACKLOG = 512
_KEEP_ALIVE_S = 75
_DRAIN_S = 5
_UNWIND_S = 1.0


class PortInUse(ImpetusError):
    """Another process listens on the port."""

    code = "port_in_use"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.  Raises PortInUse, or ImpetusError for an unusable address."""
    try:
        return _listen(host, port)
    except UnicodeError as problem:
        raise ImpetusError(f"IMPETUS_HOST: {host!r} is not a valid host name.") from problem
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Port {port} on {host} is in use. Stop the program that uses it, or choose "
                f"another port with IMPETUS_PORT."
            ) from problem
        raise ImpetusError(f"Cannot listen on {host}:{port}: {problem.strerror}.") from problem


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # A restarted router must get the port although old connections are in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def check_exposure(settings: Settings) -> None:
    """Raise ImpetusError if other machines could connect without an API key."""
    if settings.is_public and settings.api_key is None:
        raise ImpetusError(
            f"IMPETUS_HOST={settings.host} accepts other machines, but no API key is set. Set "
            "IMPETUS_API_KEY, or listen on 127.0.0.1, or put a proxy with a key in front."
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
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start serving on the running loop."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        self._task.add_done_callback(_log_failure)

    async def stop(self) -> None:
        """Stop accepting, let running requests finish within the grace period, then close."""
        self._server.stop()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._socket.close()
        await self._server.abandon()


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._exit = asyncio.Event()

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


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (problem := task.exception()) is not None:
        _logger.error("the HTTP listener failed", exc_info=problem)
