"""The log, the charts and the thermal state of a running server."""

import time
from typing import Any

import httpx

from tests.integration.conftest import Servers
from tests.integration.server import Server, wait_until


def test_log_charts_and_heat_of_a_running_server(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=server.managing, timeout=60) as http:

        def shown(path: str, **query: str | int) -> dict[str, Any]:
            answer = http.get(f"/api/{path}", params=query)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        body = {"model": "smollm2-135m-instruct", "max_tokens": 4, "prompt": "Hi"}
        assert http.post("/v1/completions", json=body).status_code == 200

        log = shown("logs", limit=1000)["lines"]
        components = {line["component"] for line in log}
        assert {"router", "scheduler", "jobs", "gguf", "controller"} <= components
        assert all(abs(line["at"] - time.time()) < 86_400 for line in log)
        assert [line["at"] for line in log] == sorted(line["at"] for line in log)
        loads = shown("logs", component="gguf", text="loaded")
        assert "smollm2-135m-instruct" in loads["lines"][-1]["message"]
        first = shown("logs", limit=1, before=log[-1]["id"])
        assert first["lines"] == [log[-2]]

        assert shown("thermal")["state"] in ("unknown", "nominal", "fair", "serious", "critical")

        def lines_of(name: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = shown("metrics/series", name=name)["lines"]
            return found

        def is_sampled() -> bool:
            # A process has used processor time once it was seen twice.
            models = {line["model"].partition("@")[0] for line in lines_of("memory")}
            processes = {line["label"] for line in lines_of("cpu")}
            return "smollm2-135m-instruct" in models and processes >= {
                "router",
                "scheduler",
                "gguf",
            }

        wait_until(is_sampled, "the model in the charts", 60)
        assert [line["label"] for line in lines_of("first_token")] == ["p50", "p95"]


def test_stored_settings_count_after_a_restart(servers: Servers) -> None:
    server = servers.get(FORMATS="echo")
    path, headers = f"{server.url}/api/settings", server.managing

    def waiting_of(answer: httpx.Response) -> tuple[Any, ...]:
        assert answer.status_code == 200, answer.text
        found = {one["name"]: one for one in answer.json()["settings"]}["max_waiting"]
        return found["value"], found["next_value"], found["source"]

    assert waiting_of(httpx.get(path)) == (256, 256, "default")
    change = {"values": {"max_waiting": 7}}
    changed = httpx.patch(path, json=change, headers=headers, timeout=30)
    assert waiting_of(changed) == (256, 7, "default")
    fixed = httpx.patch(path, json={"values": {"threads": 2}}, headers=headers, timeout=30)
    assert fixed.status_code == 409
    assert "IMPETUS_THREADS" in fixed.json()["error"]["message"]
    assert server.stop() == 0
    server.start(FORMATS="echo")
    assert waiting_of(httpx.get(path)) == (7, 7, "stored")
