"""The router's own HTTP listener: one socket, one uvicorn server, in the replica's event loop."""

import asyncio
import errno
import socket

import uvicorn
from starlette.types import ASGIApp

from core.errors import ImpetusError
from core.settings import Settings

_BACKLOG = 512
_DRAIN_S = 5


class PortInUse(ImpetusError):
    """Somebody else listens on the port."""

    code = "port_in_use"


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket.  Raises PortInUse, or ImpetusError for a host that is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A restarted router must get the port back although old connections linger.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as problem:
        listener.close()
        if problem.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Port {port} on {host} is in use. Stop the program that holds it, or choose "
                f"another port with IMPETUS_PORT."
            ) from problem
        raise ImpetusError(f"Cannot listen on {host}:{port}: {problem.strerror}") from problem
    return listener


def check_exposure(settings: Settings) -> None:
    """Raise ImpetusError where the listener would be open to other machines without a key."""
    if settings.is_public and settings.api_key is None:
        raise ImpetusError(
            f"IMPETUS_HOST={settings.host} lets other machines in, but no API key is set. Set "
            "IMPETUS_API_KEY, or listen on 127.0.0.1, or put a proxy with a key in front."
        )


class Listener:
    """Serves an ASGI application on the configured address until stopped."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        """Bind the port.  Raises PortInUse, or ImpetusError for an address that is refused."""
        check_exposure(settings)
        self._socket = bind(settings.host, settings.port)
        config = uvicorn.Config(
            app,
            loop="none",
            http="httptools",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_DRAIN_S,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to serve on the running loop."""
        self._task = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Take no more connections, let running requests end for up to 5 s, then close."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()


class _Server(uvicorn.Server):
    """A uvicorn server that leaves the process' signals alone."""

    def install_signal_handlers(self) -> None:
        """Do nothing: Ray owns the signals."""

    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Do nothing either; newer versions use this one."""
        import contextlib

        return contextlib.nullcontext()
