"""Parts that Serve or Ray start again: the router, and Serve's controller."""

import os
import signal

import httpx
import psutil
from openai import OpenAI

from tests.integration.faults.test_faults import ask
from tests.integration.server import Server, wait_until


def controllers(server: Server) -> set[int]:
    """Return the process ids of Serve's controller: one, none, or both of a change."""
    assert server.process is not None
    found = set()
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if "ServeController" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def is_ready(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_requests_go_on_without_serves_controller(server: Server, client: OpenAI) -> None:
    ask(client)
    wait_until(lambda: len(controllers(server)) == 1, "one controller runs")
    before = controllers(server)
    (old,) = before
    os.kill(old, signal.SIGKILL)
    for _ in range(3):
        assert ask(client)
    wait_until(lambda: bool(controllers(server) - before), "a new controller runs")
    wait_until(lambda: is_ready(server), "the server is ready")
    assert ask(client)


def test_a_router_that_dies_listens_again(server: Server, client: OpenAI) -> None:
    ask(client)
    before = server.pid_of("router")
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: is_ready(server), "a new router is ready")
    assert server.pid_of("router") != before
    # The models are still where they were.
    loads = server.shown("impetus_loads_total")
    assert ask(client)
    assert server.shown("impetus_loads_total") == loads
