"""Unix socket that carries event frames from replicas to the router."""

import asyncio
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from core.errors import ImpetusError
from deployments.transport.codec import (
    LENGTH_BYTES,
    StepEvents,
    decode_body,
    decode_length,
    encode_frame,
)
from router.services import EventCallback

logger = logging.getLogger(__name__)

# macOS allows 104 bytes for a socket's path, its closing zero included.
_MAX_PATH_BYTES = 100
_MAX_UNSENT_BYTES = 16 * 1024 * 1024


class FrameSender:
    """A replica's end: sends each step's events to one router.  Thread-safe, never blocks.

    Bytes that the socket does not accept are buffered, up to 16 MiB, and sent with the next step.
    """

    def __init__(self, path: str) -> None:
        """Connect to the router's socket.  Raises OSError."""
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._socket.setblocking(False)
        self._watchers: set[Callable[[], object]] = set()
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
        """Send one frame; implements `backends.base.EventReceiver`."""
        frame = encode_frame(batch)
        with self._lock:
            if not self.is_broken:
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
            del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError as problem:
            self._break(f"the router closed it: {problem}")
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            self._break("the router does not read")

    def _break(self, reason: str) -> None:
        logger.warning("event socket closed: %s", reason)
        self._shut()

    def _shut(self) -> None:
        self.is_broken = True
        self._unsent.clear()
        self._socket.close()
        for on_break in self._watchers:
            on_break()

    def close(self) -> None:
        """Close the socket; idempotent."""
        with self._lock:
            self._shut()


class FrameReceiver:
    """The router's end: one socket in a private folder receives all replicas' frames."""

    def __init__(self) -> None:
        self._callbacks: dict[str, EventCallback] = {}
        self._server: asyncio.Server | None = None
        self._folder: Path | None = None
        self._connections: set[_Connection] = set()
        self.path = ""

    async def start(self) -> None:
        """Listen.  Raises ImpetusError if the socket's path is too long for the system."""
        base = "/tmp" if os.access("/tmp", os.W_OK) else None
        # mkdtemp makes the folder with mode 0700.
        self._folder = Path(tempfile.mkdtemp(prefix="impetus-", dir=base))
        path = str(self._folder / "events")
        if len(path.encode()) > _MAX_PATH_BYTES:
            raise ImpetusError(
                f"The path of the event socket exceeds {_MAX_PATH_BYTES} bytes: {path}"
            )
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: _Connection(self._callbacks, self._connections), path
        )
        self.path = path

    def subscribe(self, request_id: str, on_events: EventCallback) -> None:
        """Call `on_events`, on the event loop, with a request's events as they arrive."""
        self._callbacks[request_id] = on_events

    def unsubscribe(self, request_id: str) -> None:
        """Ignore a request's events from now on."""
        self._callbacks.pop(request_id, None)

    async def stop(self) -> None:
        """Stop listening and remove the folder; idempotent."""
        for connection in list(self._connections):
            connection.close()
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class _Connection(asyncio.Protocol):
    """Splits one replica's byte stream into frames and calls each request's callback."""

    def __init__(
        self, callbacks: Mapping[str, EventCallback], connections: "set[_Connection]"
    ) -> None:
        self._callbacks = callbacks
        self._connections = connections
        self._buffer = bytearray()
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= LENGTH_BYTES:
                length = decode_length(self._buffer, start)
                end = start + LENGTH_BYTES + length
                if len(self._buffer) < end:
                    break
                for request_id, events in decode_body(
                    bytes(self._buffer[start + LENGTH_BYTES : end])
                ):
                    on_events = self._callbacks.get(request_id)
                    if on_events is not None:
                        on_events(events)
                start = end
        except ValueError:
            logger.exception("a replica sent a broken frame")
            self.close()
            return
        del self._buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._connections.discard(self)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()
