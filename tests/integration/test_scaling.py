"""Processes that end when nobody needs them, come back, and that are several."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil

from tests.integration.server import HTTP, Server, wait_until

# Streams of this model are bytes: no weights, so that only the processes are at stake.
MODEL = "echo"


def chat(server: Server, content: str) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    return HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def decisions(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = HTTP.get(f"{server.url}/api/decisions").json()["decisions"]
    return found


def loads(server: Server) -> int:
    return sum(one["action"].startswith("load ") for one in decisions(server))


def is_running(server: Server) -> bool:
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    return any("ServeReplica:impetus:echo" in _title(child) for child in children)


def test_an_idle_format_ends_and_its_next_request_is_served(narrow: Server) -> None:
    assert chat(narrow, "first").json()["choices"][0]["message"]["content"] == "first"
    assert loads(narrow) == 1
    wait_until(lambda: not is_running(narrow), "the idle process ended", 120)
    answer = chat(narrow, "again")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "again"
    assert loads(narrow) == 2
    assert "load;dur=" in answer.headers["x-impetus-timing"]


def test_two_replicas_load_a_model_once_and_requests_find_it(doubled: Server) -> None:
    replicas = [one for one in doubled.tree if "ServeReplica:impetus:echo" in _title(one)]
    assert len(replicas) == 2
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: chat(doubled, f"{number}"), range(12)))
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [str(number) for number in range(12)]
    # Residency is respected: a request that came to the other replica would cost a load.
    assert [chat(doubled, "x").status_code for _ in range(10)] == [200] * 10
    assert loads(doubled) == 1
    assert doubled.shown("impetus_loads_total") == 1


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
