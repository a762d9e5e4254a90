"""The scheduler is off the hot path: a resident model answers while it hangs or is dead."""

import os
import signal

import httpx
from openai import OpenAI

from tests.integration.faults.test_faults import ask
from tests.integration.server import STARTER, Server, wait_until


def test_a_resident_model_answers_without_the_scheduler(server: Server, client: OpenAI) -> None:
    ask(client)
    pid = server.pid_of("scheduler")
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            assert ask(client)
        assert server.metric("impetus_scheduler_up") == 0
        assert server.metric("impetus_memory_budget_bytes") is None
        assert server.shown("impetus_engine_steps_total", model=f"{STARTER}@gguf-q4_1")
        silent = httpx.get(f"{server.url}/api/decisions", timeout=30)
        assert silent.status_code == 503
        assert silent.json()["error"]["code"] == "unavailable"
        unready = httpx.get(f"{server.url}/readyz", timeout=30)
        assert unready.status_code == 503
        assert "scheduler" in unready.json()["error"]["message"]
        assert httpx.get(f"{server.url}/healthz", timeout=30).status_code == 200
    finally:
        os.kill(pid, signal.SIGKILL)
    assert ask(client)
    wait_until(lambda: server.metric("impetus_scheduler_up") == 1, "a new scheduler answers")
    assert server.pid_of("scheduler") != pid
    wait_until(
        lambda: bool(server.metric("impetus_model_resident_bytes", model=f"{STARTER}@gguf-q4_1")),
        "the new scheduler knows what is resident",
    )
    wait_until(
        lambda: httpx.get(f"{server.url}/readyz", timeout=30).status_code == 200,
        "the server is ready again",
    )
    parts = ("folder scans", "memory ledger", "publisher", "thermal watch")
    for part in parts:
        assert server.shown("impetus_part_up", process="scheduler", part=part) == 1
    for part in ("HTTP listener", "event socket", "model states"):
        assert server.shown("impetus_part_up", process="router", part=part) == 1
