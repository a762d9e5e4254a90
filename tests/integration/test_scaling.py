"""Processes that end when nobody needs them, come back, and that are several."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.integration.server import ROOT, Server, wait_until

# Streams of this model are bytes: no weights, so that only the processes are at stake.
MODEL = "echo"


def chat(server: Server, content: str) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def decisions(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{server.url}/api/decisions").json()["decisions"]
    return found


def loads(server: Server) -> int:
    return sum(one["action"].startswith("load ") for one in decisions(server))


def is_running(server: Server) -> bool:
    return server.metric("impetus_process_pid", process="echo") is not None


def test_an_idle_format_ends_and_its_next_request_is_served(other_server: Server) -> None:
    other_server.start(FORMATS="echo", FORMAT_IDLE_S="3")
    assert chat(other_server, "first").json()["choices"][0]["message"]["content"] == "first"
    assert is_running(other_server)
    wait_until(lambda: not is_running(other_server), "the idle process ended", 120)
    answer = chat(other_server, "again")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "again"
    assert loads(other_server) == 2
    assert "load;dur=" in answer.headers["x-impetus-timing"]
    assert other_server.stop() == 0


def two_replicas(path: Path) -> Path:
    """Write a configuration in which the echo format always has two replicas."""
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    scaling = {"min_replicas": 2, "initial_replicas": 2, "max_replicas": 2}
    content["applications"][0]["deployments"].append({"name": MODEL, "autoscaling_config": scaling})
    path.write_text(yaml.safe_dump(content))
    return path


def test_two_replicas_load_a_model_once_and_requests_find_it(
    other_server: Server, tmp_path: Path
) -> None:
    config = two_replicas(tmp_path / "config.yaml")
    launcher = (sys.executable, "-m", "deployments.start.launcher", str(config))
    other_server.start(*launcher, FORMATS="echo", MAX_REPLICAS="2")
    replicas = [one for one in other_server.tree if "ServeReplica:impetus:echo" in _title(one)]
    assert len(replicas) == 2
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: chat(other_server, f"{number}"), range(12)))
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [str(number) for number in range(12)]
    # Residency is respected: a request that came to the other replica would cost a load.
    assert [chat(other_server, "x").status_code for _ in range(10)] == [200] * 10
    assert loads(other_server) == 1
    assert other_server.metric("impetus_loads_total") == 1
    assert other_server.stop() == 0


def _title(process: Any) -> str:
    return " ".join(process.cmdline())
