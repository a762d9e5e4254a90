"""Serves the test hub on two origins of the loopback interface: the Hub, and its file storage."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from scripts.hub_lib.answers import Answer, FileBody, Request
from scripts.hub_lib.api import HubApi, HubState, Logged
from scripts.hub_lib.faults import Faults
from scripts.hub_lib.repositories import Commit, Repository

_PIECE_BYTES = 1 << 18
_SLOW_PIECES_PER_S = 10
_MAX_BODY_BYTES = 4096
_ON_THE_WAY = frozenset({"stall", "slow", "truncate", "corrupt"})


class Hub:
    """A running hub: `endpoint` is what HF_ENDPOINT is set to; files in LFS are on `cdn_origin`.

    The two differ in host name and port, as huggingface.co and its storage do.
    """

    def __init__(self, port: int = 0) -> None:
        """Listen on a free port of 127.0.0.1, or on `port`.  Raises OSError."""
        self._state = HubState()
        self._stopping = threading.Event()
        self._cdn = _Server(0, self._state, self._stopping)
        self._server = _Server(port, self._state, self._stopping)
        self.cdn_origin = f"http://localhost:{self._cdn.server_port}"
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        api = HubApi(self._state, self.cdn_origin)
        self._server.serve(self.endpoint, api.answer)
        self._cdn.serve(self.cdn_origin, api.cdn_answer)

    @property
    def faults(self) -> Faults:
        """The faults that are switched on."""
        return self._state.faults

    @property
    def requests(self) -> list[Logged]:
        """What was asked so far, in order."""
        with self._state.lock:
            return list(self._state.requests)

    def forget_requests(self) -> None:
        """Empty the log of requests."""
        with self._state.lock:
            self._state.requests.clear()

    def set_pages(self, repositories: int, entries: int) -> None:
        """Set how many items a page of a search and of a file listing has at most."""
        with self._state.lock:
            self._state.page_items, self._state.tree_items = repositories, entries

    def add_user(self, user: str, token: str) -> None:
        """Accept a token as that of a user."""
        with self._state.lock:
            self._state.users[token] = user

    def publish(
        self,
        name: str,
        folder: Path,
        sha: str = "",
        *,
        stated: Mapping[str, str] | None = None,
        date: str = "",
        **facts: Any,
    ) -> Commit:
        """Make the present content of `folder` the main revision of the repository `name`.

        The files are read when they are asked for; later changes to them would change the commit.
        `sha`, `date`, `stated`: see `Repository.add`; `facts` are fields of `Repository`.
        """
        with self._state.lock:
            repository = self._state.repositories.setdefault(name, Repository(name))
            for field, value in facts.items():
                setattr(repository, field, value)
            return repository.add(folder, sha=sha, date=date, stated=stated)

    def move(self, name: str) -> Commit:
        """Add a commit to a repository, with the same files."""
        with self._state.lock:
            return self._state.repositories[name].move()

    def stop(self) -> None:
        """Close all connections and end; blocks until both origins are closed."""
        self._stopping.set()
        for server in (self._server, self._cdn):
            server.close()


@contextmanager
def running_hub(port: int = 0) -> Iterator[Hub]:
    """Run a hub in this process, on threads."""
    hub = Hub(port)
    try:
        yield hub
    finally:
        hub.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, state: HubState, stopping: threading.Event) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.state = state
        self.stopping = stopping
        self.origin = ""
        self.answer: Callable[[Request], Answer]
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def serve(self, origin: str, answer: Callable[[Request], Answer]) -> None:
        """Begin to answer."""
        self.origin, self.answer = origin, answer
        self._thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle one connection, which `close` can end."""
        with self._lock:
            self._connections.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report errors of the hub itself; clients that went away are none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        """End all connections and stop."""
        self.shutdown()
        self._thread.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Requests are in the log of the hub's state."""

    def _handle(self) -> None:
        state = self.server.state
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = min(int(headers.get("content-length") or 0), _MAX_BODY_BYTES)
        request = Request(
            method=self.command,
            path=parts.path,
            query=parse_qs(parts.query),
            headers=headers,
            origin=self.server.origin,
            body=self.rfile.read(length),
        )
        is_control = request.path.startswith("/_control/")
        logged = Logged(headers.get("host", ""), self.command, self.path, headers)
        if not is_control:
            with state.lock:
                state.requests.append(logged)
        answer = self.server.answer(request)
        logged.status = answer.status
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        if "drop" in answer.faults:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(answer.length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(answer)

    def _send_body(self, answer: Answer) -> None:
        """Send the body, with the faults that happen on the way."""
        faults, body = answer.faults, answer.body
        if not faults.keys() & _ON_THE_WAY and isinstance(body, FileBody):
            if not body.count:
                return
            with body.source.open("rb") as stream:
                self.connection.sendfile(stream, body.start, body.count)
            return
        sent = 0
        for piece in _pieces(answer):
            for kind in ("truncate", "stall"):
                if kind in faults and sent + len(piece) > faults[kind].at:
                    self.wfile.write(piece[: max(faults[kind].at - sent, 0)])
                    self._break(kind, faults[kind].seconds)
                    return
            self.wfile.write(piece)
            sent += len(piece)
            if "slow" in faults:
                self.server.stopping.wait(1 / _SLOW_PIECES_PER_S)

    def _break(self, kind: str, seconds: float) -> None:
        """Wait as long as a stall lasts, and close the connection."""
        if kind == "stall":
            until = time.monotonic() + seconds
            # The client's leaving ends the wait as well.
            self.connection.settimeout(0.2)
            while time.monotonic() < until and not self.server.stopping.is_set():
                try:
                    if not self.connection.recv(1):
                        break
                except TimeoutError:
                    continue
        self.close_connection = True


def _pieces(answer: Answer) -> Iterator[bytes]:
    """Yield the bytes of a body, with one changed if they are to be corrupt."""
    size, body = _PIECE_BYTES, answer.body
    if "slow" in answer.faults:
        size = max(int(answer.faults["slow"].value or 1) // _SLOW_PIECES_PER_S, 1)
    if isinstance(body, bytes):
        yield from (body[start : start + size] for start in range(0, len(body), size))
        return
    changed = answer.faults["corrupt"].at if "corrupt" in answer.faults else -1
    position, left = body.start, body.count
    with body.source.open("rb") as stream:
        stream.seek(position)
        while left and (piece := bytearray(stream.read(min(size, left)))):
            if position <= changed < position + len(piece):
                piece[changed - position] ^= 0xFF
            yield bytes(piece)
            position += len(piece)
            left -= len(piece)
