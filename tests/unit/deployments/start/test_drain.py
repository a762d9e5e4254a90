"""The launcher's word to a running server that it shall stop."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import Request

import pytest

from core.settings import Settings
from deployments.start.drain import drain
from deployments.start.readiness import local_url


@contextmanager
def answering(*counts: int | str) -> Iterator[tuple[Settings, list[dict[str, str]]]]:
    """Serve these numbers of running requests, the last for ever; give the requests' headers."""
    left, seen = list(counts), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(
                {**{key.lower(): value for key, value in self.headers.items()}, "path": self.path}
            )
            self.rfile.read(int(self.headers["content-length"]))
            count = left.pop(0) if len(left) > 1 else left[0]
            content = json.dumps({"in_flight": count}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Stay silent."""

    with TemporaryDirectory() as folder, HTTPServer(("127.0.0.1", 0), Handler) as server:
        home = Path(folder)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            port = server.server_address[1]
            yield Settings(home=home, port=port, api_key="sesame", drain_limit_s=30), seen
        finally:
            server.shutdown()
            thread.join()


def test_f10_it_waits_until_nothing_runs() -> None:
    with answering(2, 1, 0) as (settings, seen):
        drain(settings, lambda: False)
    assert [one["path"] for one in seen] == ["/api/drain"] * 3
    assert seen[0]["authorization"] == "Bearer sesame"
    assert len(seen[0]["x-impetus-token"]) == 64


def test_f10_impatience_ends_the_waiting() -> None:
    with answering(1) as (settings, seen):
        drain(settings, lambda: len(seen) == 2)
    assert len(seen) == 2


@pytest.mark.parametrize("answer", ["many", 0])
def test_a_server_that_says_nothing_useful_is_not_waited_for(answer: int | str) -> None:
    with answering(answer) as (settings, seen):
        drain(settings, lambda: False)
    assert len(seen) == 1


def test_f10_a_server_that_is_slow_to_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Exception] = [
        TimeoutError("read"),
        URLError(TimeoutError("connect")),
        ConnectionResetError(),
    ]

    def open_direct(request: Request, limit_s: float) -> None:
        del request, limit_s
        raise outcomes.pop(0)

    monkeypatch.setattr("deployments.start.drain.open_direct", open_direct)
    drain(Settings(drain_limit_s=30), lambda: False)
    assert outcomes == []


def test_a_server_that_is_gone_is_not_waited_for() -> None:
    drain(Settings(port=1, drain_limit_s=30), lambda: False)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
    ],
)
def test_the_server_is_reached_where_it_listens(host: str, url: str) -> None:
    assert local_url(Settings(host=host)) == url
