"""When the launcher gives a server up that no longer becomes ready."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from core.settings import Settings
from deployments.start import readiness
from deployments.start.drain import drain
from deployments.start.readiness import (
    Readiness,
    ReadinessHistory,
    ReadinessWatch,
    ask_readiness,
)

READY, UNREADY, DRAINING, SILENT = Readiness


def verdicts(*answers: Readiness, step_s: float = 5.0) -> list[str]:
    """Return what is said after each answer, `step_s` apart."""
    times = iter(step_s * number for number in range(len(answers) + 1))
    now = [0.0]
    history = ReadinessHistory(lambda: now[0])
    said = []
    for answer in answers:
        now[0] = next(times)
        said.append(history.note(answer))
    return said


def test_a_silent_server_is_given_up_after_a_minute() -> None:
    said = verdicts(READY, *[SILENT] * 13)
    assert said[:-1] == [""] * 13
    assert said[-1] == "The server has not answered for 60 s"


def test_a_server_that_is_not_ready_is_given_up_after_three_minutes() -> None:
    said = verdicts(*[UNREADY] * 37)
    assert said[:-1] == [""] * 36
    assert said[-1].startswith("The server has not been ready for 180 s")


@pytest.mark.parametrize(
    "answers",
    [
        [DRAINING] * 1000,
        [READY] * 1000,
        [SILENT, READY] * 500,
        [*[SILENT] * 12, READY] * 50,
        [*[UNREADY] * 36, DRAINING] * 20,
    ],
)
def test_a_drain_and_passing_troubles_are_waited_for(answers: list[Readiness]) -> None:
    assert set(verdicts(*answers)) == {""}


def test_a_pause_of_this_process_is_not_taken_for_silence() -> None:
    assert set(verdicts(READY, *[SILENT] * 5, step_s=3600)) == {""}


@contextmanager
def answering(status: int, body: bytes) -> Iterator[Settings]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Stay silent."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Settings(port=server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def error(code: str) -> bytes:
    return json.dumps({"error": {"code": code}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "answer"),
    [
        (200, b"{}", READY),
        (204, b"", UNREADY),
        (503, error("unavailable"), UNREADY),
        (503, error("draining"), DRAINING),
        (503, b"not JSON", UNREADY),
        (503, b'{"error": null}', UNREADY),
        (404, b"", UNREADY),
    ],
)
def test_the_answer_is_read(
    status: int, body: bytes, answer: Readiness, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A proxy cannot reach this machine's loopback.
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with answering(status, body) as settings:
        assert ask_readiness(settings) is answer


@contextmanager
def replying(reply: bytes) -> Iterator[Settings]:
    """Serve these bytes once, then close the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield Settings(port=server.getsockname()[1], drain_limit_s=30)
        thread.join()


NOT_HTTP = (b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n")


@pytest.mark.parametrize("reply", NOT_HTTP)
def test_what_is_not_http_counts_as_silence(reply: bytes) -> None:
    with replying(reply) as settings:
        assert ask_readiness(settings) is SILENT


def test_an_answer_that_breaks_off_has_no_code() -> None:
    with replying(b"HTTP/1.1 503 x\r\ncontent-length: 99\r\n\r\n{") as settings:
        assert ask_readiness(settings) is UNREADY


@pytest.mark.parametrize("length", [2, 99])
def test_a_server_whose_answer_breaks_off_is_not_drained(length: int) -> None:
    reply = f"HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n[]"
    with replying(reply.encode()) as settings:
        drain(settings, lambda: False)


@pytest.mark.parametrize("reply", NOT_HTTP)
def test_what_is_not_http_is_not_drained(reply: bytes) -> None:
    with replying(reply) as settings:
        drain(settings, lambda: False)


def test_the_watch_reports_once_and_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_INTERVAL_S", 0.001)
    monkeypatch.setattr(readiness, "_SILENCE_LIMIT_S", 0.0)
    monkeypatch.setattr(readiness, "ask_readiness", lambda _: SILENT)
    told = threading.Event()
    watch = ReadinessWatch(Settings(), told.set)
    assert told.wait(30)
    assert watch.verdict
    watch.stop()
