"""Unix socket that carries event frames from replicas to the router."""

import asyncio
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from core.errors import EngineFailed, ImpetusError
from core.supervision import Supervisor
from deployments.transport.acceptor import Acceptor, SocketLost
from deployments.transport.codec import (
    LENGTH_BYTES,
    Arrival,
    StepEvents,
    decode_body,
    decode_length,
    encode_frames,
)
from router.services import EventCallback

logger = logging.getLogger(__name__)

ErrorCallback: TypeAlias = Callable[[Exception], None]

# macOS allows 104 bytes for a socket's path, its closing zero included.
_MAX_PATH_BYTES = 100
_BACKLOG = 128
_CHECK_S = 1.0
_MAX_UNSENT_BYTES = 256 * 1024 * 1024
# A router that is merely busy with large answers is given time.
_MAX_STALLED_BYTES = 16 * 1024 * 1024
_STALL_S = 10.0


class FrameSender:
    """A replica's end: sends each step's events to one router.  Thread-safe, never blocks.

    Bytes that the socket does not accept are buffered and sent with the next step.  The connection
    breaks when 16 MiB are buffered and none was accepted for 10 s, or at 256 MiB.
    """

    def __init__(self, path: str) -> None:
        """Connect to the router's socket.  Raises OSError."""
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._socket.setblocking(False)
        self._watchers: set[Callable[[], object]] = set()
        self._stalled_at: float | None = None
        self.is_broken = False

    @contextmanager
    def watched(self, on_break: Callable[[], object]) -> Iterator[None]:
        """Call `on_break`, from any thread, if the connection breaks inside the context."""
        with self._lock:
            self._watchers.add(on_break)
        try:
            yield
        finally:
            with self._lock:
                self._watchers.discard(on_break)

    def deliver(self, batch: StepEvents) -> None:
        """Send a step's events; implements `backends.base.EventReceiver` and never raises."""
        frames = encode_frames(batch)
        with self._lock:
            if self.is_broken:
                return
            for frame in frames:
                self._unsent += frame
            self._send()

    def flush(self) -> bool:
        """Send buffered bytes; return whether the buffer is empty."""
        with self._lock:
            if self._unsent:
                self._send()
            return not self._unsent

    def _send(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError as problem:
            self._break(f"the router closed it: {problem}")
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._stalled_at = None
            return
        if sent or self._stalled_at is None:
            self._stalled_at = time.monotonic()
        unsent, stalled_s = len(self._unsent), time.monotonic() - self._stalled_at
        is_stalled = unsent > _MAX_STALLED_BYTES and stalled_s > _STALL_S
        if is_stalled or unsent > _MAX_UNSENT_BYTES:
            self._break("the router does not read")

    def _break(self, reason: str) -> None:
        logger.warning("event socket closed: %s", reason)
        self._shut()

    def _shut(self) -> None:
        self.is_broken = True
        self._unsent.clear()
        self._socket.close()
        for on_break in self._watchers:
            try:
                on_break()
            except Exception:
                logger.exception("cannot report a broken connection")

    def close(self) -> None:
        """Close the socket; idempotent."""
        with self._lock:
            self._shut()


@dataclass(slots=True, eq=False)
class _Subscription:
    """Where one request's events go; `source` is the connection that brought the last ones."""

    on_events: EventCallback
    on_error: ErrorCallback | None
    source: "_Connection | None" = None


class FrameReceiver:
    """The router's end: one socket in a private folder receives all replicas' frames.

    The folder is made anew if someone removes it; `path` then changes, and replicas connect to it
    with their next request.
    """

    def __init__(self) -> None:
        self._subscriptions: dict[str, _Subscription] = {}
        self._folder: Path | None = None
        self._connections: set[_Connection] = set()
        self._acceptor: Acceptor | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.path = ""

    async def start(self, supervisor: Supervisor | None = None) -> None:
        """Listen.  Raises ImpetusError if the socket's path is too long for the system."""
        supervisor = supervisor or Supervisor()
        self._acceptor = Acceptor(
            "event socket",
            self._listen,
            lambda: _Connection(self._subscriptions, self._connections),
            self._listen(),
        )
        self._tasks = [supervisor.keep_running("event socket", self._run)]

    @property
    def problem(self) -> str:
        """Why no replica could connect, as a sentence; empty if they can."""
        if self._acceptor is None:
            return "The event socket does not listen."
        reason = self._acceptor.problem or self._path_problem()
        return f"The event socket does not work: {reason}." if reason else ""

    def _path_problem(self) -> str:
        # Programs that clean /tmp remove old sockets.
        return "" if os.path.exists(self.path) else f"{self.path} was removed"

    def _listen(self) -> socket.socket:
        """Return a listening socket in a new private folder."""
        self._remove_folder()
        base = "/tmp" if os.access("/tmp", os.W_OK) else None
        # mkdtemp makes the folder with mode 0700.
        self._folder = Path(tempfile.mkdtemp(prefix="impetus-", dir=base))
        path = str(self._folder / "events")
        if len(path.encode()) > _MAX_PATH_BYTES:
            raise ImpetusError(
                f"The path of the event socket exceeds {_MAX_PATH_BYTES} bytes: {path}"
            )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        self.path = path
        return listener

    async def _run(self) -> None:
        """Accept until cancelled.  Raises SocketLost if replicas cannot connect any more."""
        assert self._acceptor is not None
        accepting = asyncio.ensure_future(self._acceptor.run())
        try:
            while not accepting.done():
                await asyncio.wait({accepting}, timeout=_CHECK_S)
                if reason := self._path_problem():
                    raise SocketLost(reason)
            await accepting
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)

    def subscribe(
        self, request_id: str, on_events: EventCallback, on_error: ErrorCallback | None = None
    ) -> None:
        """Call `on_events`, on the event loop, with a request's events as they arrive.

        `on_error` is called instead, at most once, if some are lost: nothing arrives after it.
        """
        self._subscriptions[request_id] = _Subscription(on_events, on_error)

    def unsubscribe(self, request_id: str) -> None:
        """Ignore a request's events from now on."""
        self._subscriptions.pop(request_id, None)

    async def stop(self) -> None:
        """Stop listening and remove the folder; idempotent."""
        if self._acceptor is not None:
            await self._acceptor.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for connection in list(self._connections):
            connection.close()
        self._remove_folder()

    def _remove_folder(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


class _Connection(asyncio.Protocol):
    """Splits one replica's byte stream into frames and calls each request's callback.

    What goes wrong for one request ends that one.  A stream that is no sequence of frames ends the
    requests that it carried, and the connection.
    """

    def __init__(
        self, subscriptions: dict[str, _Subscription], connections: "set[_Connection]"
    ) -> None:
        self._subscriptions = subscriptions
        self._connections = connections
        self._buffer = bytearray()
        self._transport: asyncio.BaseTransport | None = None
        self._is_broken = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._is_broken:
            return
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= LENGTH_BYTES:
                length = decode_length(self._buffer, start)
                end = start + LENGTH_BYTES + length
                if len(self._buffer) < end:
                    break
                arrivals = decode_body(bytes(self._buffer[start + LENGTH_BYTES : end]))
                start = end
                for request_id, arrival in arrivals:
                    self._deliver(request_id, arrival)
        except Exception as problem:
            self._break(problem)
            return
        del self._buffer[:start]

    def _deliver(self, request_id: str, arrival: Arrival) -> None:
        subscription = self._subscriptions.get(request_id)
        if subscription is None:
            return
        subscription.source = self
        if isinstance(arrival, EngineFailed):
            self._fail(request_id, arrival)
            return
        try:
            subscription.on_events(arrival)
        except Exception as problem:
            logger.exception("the events of %s cannot be handled", request_id)
            self._fail(request_id, problem)

    def _fail(self, request_id: str, problem: Exception) -> None:
        """End one request's events with `problem`."""
        subscription = self._subscriptions.pop(request_id, None)
        if subscription is None or subscription.on_error is None:
            return
        try:
            subscription.on_error(problem)
        except Exception:
            logger.exception("the failure of %s cannot be reported", request_id)

    def _break(self, problem: Exception) -> None:
        """End the connection and its requests, since it cannot tell whose events are lost."""
        logger.error("a replica sent a broken frame", exc_info=problem)
        self._is_broken = True
        self._buffer.clear()
        lost = EngineFailed(
            "The connection between the engine and the router broke; send the request again."
        )
        carried = [name for name, one in self._subscriptions.items() if one.source is self]
        for request_id in carried:
            self._fail(request_id, lost)
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._buffer and not self._is_broken:
            # The replica died or gave up; its call reports that, and may resume the request.
            logger.warning("a replica's connection ended within a frame: %s", exc or "closed")
        self._buffer.clear()
        self._connections.discard(self)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()
