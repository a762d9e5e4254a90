"""From a hub to an answer: a download that outlives its process and the server."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub
from tests.integration.management.nice_hub import ID, NAME, nice_hub
from tests.integration.server import HTTP, Server, wait_until

PAGE_BYTES = 1_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with nice_hub(tmp_path) as hub:
        yield hub


def get(server: Server, path: str) -> Any:
    """Return an answer of the management API, once the jobs' process gives one."""
    found: list[Any] = []

    def is_answered() -> bool:
        answer = HTTP.get(f"{server.url}{path}", timeout=60)
        if answer.status_code == 503:
            return False
        assert answer.status_code == 200, answer.text
        found.append(answer.json())
        return True

    wait_until(is_answered, f"{path} is answered")
    return found[-1]


def process_of_jobs(server: Server) -> psutil.Process:
    assert server.process is not None
    found = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "ServeReplica:impetus:jobs" in " ".join(process.cmdline())
    ]
    assert len(found) == 1
    return found[0]


def begin(server: Server, model: str) -> str:
    """Begin a download, for which the request is sent twice; return the path of its job."""
    begun, repeated = (
        HTTP.post(
            f"{server.url}/api/downloads",
            json={"model": model},
            headers={**server.managing, "idempotency-key": "one"},
            timeout=60,
        )
        for _ in range(2)
    )
    assert begun.status_code == 202, begun.text
    assert (repeated.status_code, repeated.json()) == (202, begun.json())
    assert repeated.headers["idempotency-replayed"] == "true"
    return f"/api/jobs/{begun.json()['id']}"


def said(server: Server) -> str:
    """Return what the downloaded model answers."""
    body = {"model": ID, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    answer = HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_download_outlives_its_process_and_the_server_and_answers(
    hub: Hub, other_server: Server
) -> None:
    server = other_server
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    server.inherited = {**kept, "HF_ENDPOINT": hub.endpoint}
    settings = {"STARTERS": "false", "FORMATS": "gguf,echo", "SCAN_INTERVAL_S": "600"}
    server.start(**settings)
    (model,) = get(server, "/api/hub/search?query=nice")["models"]
    repository = get(server, f"/api/hub/models/{model['id']}?context=512")
    assert repository["choice"]["entry"] == NAME
    pasted = f"{hub.endpoint}/{model['id']}/blob/main/{NAME}"
    meant = get(server, f"/api/hub/resolve?text={quote(pasted)}")
    assert (meant["kind"], meant["repository"], meant["file"]) == ("repository", model["id"], NAME)
    (entry,) = repository["entries"]
    assert (entry["fit"]["verdict"], entry["is_downloaded"]) == ("fits", False)

    slow = Fault("slow", file=NAME, value=str(4 * PAGE_BYTES))
    hub.faults.add(slow)
    hub.forget_requests()
    path = begin(server, f"{model['id']}:Q4_1")
    wait_until(lambda: get(server, path)["done_bytes"] > 5 * PAGE_BYTES, "a part has arrived")
    arrived = get(server, path)["done_bytes"]
    old = process_of_jobs(server)
    old.send_signal(signal.SIGKILL)
    wait_until(
        lambda: get(server, path)["done_bytes"] > arrived + 5 * PAGE_BYTES, "the download goes on"
    )
    assert process_of_jobs(server).pid != old.pid

    assert server.process is not None
    # The process of the jobs is a new one, and goes on for seconds without the others.
    server.tree = psutil.Process(server.process.pid).children(recursive=True)
    server.kill()
    server.start(**settings)
    hub.faults.clear()
    wait_until(lambda: get(server, path)["state"] == "done", "the download is done", 120)
    job = get(server, path)
    assert (job["done_bytes"], job["model_ids"]) == (entry["size_bytes"], [ID])
    ranges = [each.headers.get("range") for each in hub.requests if "repos" in each.target]
    assert len(ranges) == 3
    assert ranges[0] is None
    assert all(one and one != "bytes=0-" for one in ranges[1:])
    assert said(server)
    assert get(server, f"/api/hub/models/{model['id']}")["entries"][0]["is_downloaded"]
    assert server.stop() == 0
    assert server.survivors() == []
