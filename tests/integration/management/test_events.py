"""`/api/events` of a running server: a model's life, over lost connections and killed processes."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub
from tests.integration.management.nice_hub import ID, NAME, nice_hub
from tests.integration.server import HTTP, Server, wait_until

# Of these only the newest is kept for replay.
COALESCED = {"job.progress", "job.order", "memory", "thermal"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with nice_hub(tmp_path) as hub:
        yield hub


class Reader:
    """Reads the stream on a thread of its own, from an event on."""

    def __init__(self, server: Server, last_id: str) -> None:
        self.events: list[tuple[str, Any]] = []
        self._url = f"{server.url}/api/events"
        self._last_id = last_id
        self._socket: socket.socket | None = None
        self.connect()

    @property
    def last_id(self) -> str:
        return self.events[-1][0] if self.events else self._last_id

    def connect(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def disconnect(self) -> None:
        assert self._socket is not None
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _read(self) -> None:
        headers = {"last-event-id": self.last_id}
        with (
            suppress(httpx.HTTPError),
            httpx.Client(verify=False) as client,
            client.stream("GET", self._url, headers=headers, timeout=60) as answer,
        ):
            self._socket = answer.extensions["network_stream"].get_extra_info("socket")
            event_id = ""
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    event_id = value
                elif name == "data":
                    self.events.append((event_id, json.loads(value)))

    def until(self, what: str, condition: Callable[[Any], bool], after: str = "") -> str:
        """Return the id of the first event after `after` for which the condition holds."""
        found: list[str] = []

        def has_come() -> bool:
            ids = [one for one, _ in self.events]
            start = ids.index(after) + 1 if after else 0
            found.extend(one for one, data in self.events[start:] if condition(data))
            return bool(found)

        wait_until(has_come, f"{what} is told", 120)
        return found[0]

    def kept(self) -> list[tuple[str, Any]]:
        return [one for one in self.events if one[1]["type"] not in COALESCED]


def model_is(change: str) -> Callable[[Any], bool]:
    return lambda data: (
        data["type"] == "model.state" and (data["change"], data["model"]["id"]) == (change, ID)
    )


def kill(server: Server, part: str) -> None:
    assert server.process is not None
    (found,) = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if f"ServeReplica:impetus:{part}" in " ".join(process.cmdline())
    ]
    found.send_signal(signal.SIGKILL)


def post(server: Server, path: str, body: object) -> Any:
    answer = HTTP.post(f"{server.url}{path}", json=body, headers=server.managing, timeout=120)
    assert answer.status_code < 300, answer.text
    return answer.json()


def state(server: Server) -> Any:
    answer = HTTP.get(f"{server.url}/api/state", timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def download(hub: Hub, server: Server, steady: Reader, broken: Reader) -> str:
    """Download the model, kill the process that does it, and return the id of the first event."""
    hub.faults.add(Fault("slow", file=NAME, value=str(8_000_000)))
    job = post(server, "/api/downloads", {"model": "org/Nice-GGUF:Q4_1"})["id"]
    added = steady.until("the job", lambda data: data["type"] == "job.added")

    def is_of_job(kind: str, **fields: Any) -> Callable[[Any], bool]:
        return lambda data: (
            data["type"] == kind
            and data["job"]["id"] == job
            and fields.items() <= data["job"].items()
        )

    far = steady.until("progress", is_of_job("job.progress"), added)
    kill(server, "jobs")
    steady.until("more progress", is_of_job("job.progress"), steady.last_id)
    broken.disconnect()
    hub.faults.clear()
    done = steady.until("the end", is_of_job("job.changed", state="done"), far)
    steady.until("the model", model_is("added"), added)
    order = [one for one, _ in steady.events]
    assert order.index(added) < order.index(far) < order.index(done)
    return added


def use(server: Server, steady: Reader, broken: Reader, after: str) -> None:
    """Load the model by a request, kill the scheduler, and unload the model."""
    chat = {"model": ID, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    post(server, "/v1/chat/completions", chat)
    loading = steady.until("loading", model_is("loading"), after)
    loaded = steady.until("loaded", model_is("loaded"), loading)
    ended = steady.until("the request", lambda data: data["type"] == "request.finished", after)
    (request,) = [data for one, data in steady.events if one == ended]
    assert (request["request"]["model"], request["status"]) == (ID, 200)
    assert 1 <= request["completion_tokens"] <= 8
    assert request["tokens_per_s"] > 0
    assert "Hello" not in json.dumps(request)
    broken.connect()
    broken.until("loaded", model_is("loaded"))
    kill(server, "scheduler")
    broken.disconnect()
    wait_until(lambda: state(server)["missing"] == {}, "all parts answer", 90)
    assert {one["id"]: one["state"] for one in state(server)["models"]}[ID] == "resident"
    post(server, f"/api/models/{ID}/unload", {})
    unloaded = steady.until("unloaded", model_is("unloaded"), loaded)
    steady.until("memory", lambda data: data["type"] == "memory", unloaded)


def test_a_models_life_is_told_over_lost_connections_and_killed_processes(
    hub: Hub, other_server: Server
) -> None:
    server = other_server
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    server.inherited = {**kept, "HF_ENDPOINT": hub.endpoint}
    server.start(STARTERS="false", FORMATS="gguf,echo", SCAN_INTERVAL_S="600")
    begin = state(server)
    assert begin["missing"] == {}
    assert ID not in [model["id"] for model in begin["models"]]
    assert begin["memory"]["free_bytes"] > 0
    steady, broken = Reader(server, begin["event_id"]), Reader(server, begin["event_id"])
    use(server, steady, broken, download(hub, server, steady, broken))

    # What the one reader missed, twice, is exactly what the other one got.
    broken.connect()
    broken.until("unloaded", model_is("unloaded"))
    wait_until(lambda: broken.last_id == steady.last_id, "both are equally far")
    assert broken.kept() == steady.kept()
    types = [data["type"] for _, data in steady.events]
    assert "reset" not in types
    numbers = [int(one.rpartition("-")[2]) for one, _ in steady.events]
    assert numbers == sorted(set(numbers))
    decisions = [data["action"] for _, data in steady.events if data["type"] == "decision"]
    assert f"load {ID}" in decisions

    # An id of another run is told so; open streams do not hold up the end.
    other = Reader(server, "0123abc-5")
    other.until("a reset", lambda data: data == {**data, "type": "reset", "reason": "unknown_id"})
    assert server.stop() == 0
    assert server.survivors() == []
