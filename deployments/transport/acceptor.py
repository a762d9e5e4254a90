"""Accepts connections on a listening socket; survives exhausted descriptors and lost sockets.

The loops of asyncio and uvloop differ here: asyncio logs and retries in a burst, uvloop closes the
listening socket for good.  This works the same on both.
"""

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# Seconds without accepting after descriptors or memory ran out; clients wait in the backlog.
_PAUSE_S = 0.5
_CHECK_S = 1.0
_SET_UP_LIMIT_S = 10.0
_LOG_INTERVAL_S = 60.0
# Other events of the loop get their turn after this many connections.
_MOST_AT_ONCE = 64
_LOST = (errno.EBADF, errno.ENOTSOCK, errno.EINVAL, errno.EOPNOTSUPP)
# Errors of a process or system without descriptors or memory for another connection.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class SocketLost(OSError):
    """The socket does not listen any more."""


class Acceptor:
    """Accepts connections and gives each a protocol; belongs to one event loop.

    `listen` returns a new listening socket.  `run` accepts until cancelled and closes the socket
    at its end, so that running it again listens anew; open connections are not affected.
    """

    def __init__(
        self,
        name: str,
        listen: Callable[[], socket.socket],
        protocol: Callable[[], asyncio.BaseProtocol],
        bound: socket.socket | None = None,
    ) -> None:
        """`bound` is the socket of the first run, if it listens already."""
        self._name = name
        self._listen = listen
        self._protocol = protocol
        self._socket = bound
        self._descriptor: int | None = None
        # What `getsockname` returned when the socket began to listen.
        self.address: Any = None if bound is None else bound.getsockname()
        self._lost: asyncio.Future[None] | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._logged_at = float("-inf")
        self.accepted = 0
        self.accepted_at = float("-inf")

    @property
    def is_paused(self) -> bool:
        """Whether it waits because descriptors or memory ran out."""
        return self._resume is not None

    @property
    def problem(self) -> str:
        """Why it does not accept connections; empty if it does."""
        if self._socket is None or self._lost is None:
            return f"the {self._name} does not listen"
        return _problem_of(self._socket, self.address)

    async def run(self) -> None:
        """Accept until cancelled.  Raises SocketLost, and OSError if it cannot listen."""
        loop = asyncio.get_running_loop()
        if self._socket is None:
            self._socket = self._listen()
        listener = self._socket
        listener.setblocking(False)
        self.address = listener.getsockname()
        self._descriptor = listener.fileno()
        self._lost = lost = loop.create_future()
        try:
            loop.add_reader(listener, self._on_readable)
            while not lost.done():
                if problem := _problem_of(listener, self.address):
                    raise SocketLost(problem)
                await asyncio.wait({lost}, timeout=_CHECK_S)
            lost.result()
        finally:
            self._lost = None
            if self._socket is listener:
                self._stop_reading()
                self.close()

    async def stop(self) -> None:
        """Close the socket, and wait for the connections that were just accepted; idempotent."""
        self._stop_reading()
        self.close()
        if self._opening:
            await asyncio.wait(self._opening, timeout=_CHECK_S)

    def close(self) -> None:
        """Close the socket; idempotent.  Only for one that `run` does not use."""
        self._stop_pause()
        listener, self._socket = self._socket, None
        if listener is not None:
            if _problem_of(listener, self.address):
                # The descriptor may belong to another file by now.
                listener.detach()
            else:
                listener.close()

    def _on_readable(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            if self._socket is None:
                return
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as problem:
                if not self._is_of_one_connection(problem):
                    return
                continue
            self.accepted += 1
            self.accepted_at = time.monotonic()
            self._open(connection)

    def _is_of_one_connection(self, problem: OSError) -> bool:
        """Handle an error of accept; return whether the next connection can be accepted."""
        if problem.errno in _LOST:
            if self._lost is not None and not self._lost.done():
                self._lost.set_exception(SocketLost(problem.errno, problem.strerror))
            self._stop_reading()
            return False
        if problem.errno in EXHAUSTED:
            now = time.monotonic()
            if now - self._logged_at >= _LOG_INTERVAL_S:
                self._logged_at = now
                logger.warning(
                    "the %s accepts no connections for now: %s", self._name, problem.strerror
                )
            self._stop_reading()
            self._resume = asyncio.get_running_loop().call_later(_PAUSE_S, self._go_on)
            return False
        # Source: accept(2) of Linux: errors of the new connection's network are returned here.
        return True

    def _stop_reading(self) -> None:
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)

    def _stop_pause(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None

    def _go_on(self) -> None:
        self._resume = None
        if self._socket is not None and not _problem_of(self._socket, self.address):
            asyncio.get_running_loop().add_reader(self._socket, self._on_readable)

    def _open(self, connection: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._connect(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # uvloop never returns if the protocol refuses the connection by an exception.
            async with asyncio.timeout(_SET_UP_LIMIT_S):
                await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        except OSError as problem:
            # The client left before its connection was set up.
            logger.debug("the %s lost a new connection: %s", self._name, problem)
            connection.close()
        except Exception:
            logger.exception("the %s could not set a connection up", self._name)
            connection.close()


def _problem_of(listener: socket.socket, address: object) -> str:
    """Return why a socket does not listen on `address`; empty if it does."""
    try:
        if not _listens(listener):
            return "its socket does not listen any more"
        if listener.getsockname() != address:
            return "its socket was replaced by another"
    except OSError as problem:
        return f"its socket is gone ({problem.strerror})"
    return ""


def _listens(listener: socket.socket) -> bool:
    """Return whether the socket listens; True where the system cannot tell.

    macOS has no such option for reading (XNU, `sogetoptlock`): `accept` fails there with EINVAL.
    """
    try:
        return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as problem:
        if problem.errno == errno.ENOPROTOOPT:
            return True
        raise
