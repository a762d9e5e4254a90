"""The log, the charts and the thermal state of a running server."""

import time
from typing import Any

import httpx

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
