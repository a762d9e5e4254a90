"""Starting, stopping, memory: each test has a server of its own."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.server import ROOT, STARTER, Server
from tests.starter import starter_path


def chat(server: Server, model: str, **options: object) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return httpx.post(f"{server.url}/v1/chat/completions", json={**body, **options}, timeout=60)


def test_serve_run_by_hand_works_and_leaves_no_process(other_server: Server) -> None:
    serve = str(Path(sys.executable).with_name("serve"))
    other_server.start(serve, "run", "--address", "local", "serve_config.yaml")
    assert chat(other_server, STARTER).status_code == 200
    assert other_server.stop() == 0
    assert other_server.survivors() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_f10_a_signal_during_a_stream_leaves_no_process(other_server: Server, number: int) -> None:
    other_server.start(DRAIN_LIMIT_S="1")
    body = {
        "model": STARTER,
        "messages": [{"role": "user", "content": "Write a long story."}],
        "stream": True,
        "max_tokens": 4000,
        "logit_bias": {"2": -100, "0": -100},
    }
    with httpx.stream(
        "POST", f"{other_server.url}/v1/chat/completions", json=body, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert other_server.stop(number) == 0
    assert other_server.survivors() == []


def test_models_run_at_the_priority_of_the_server(server: Server) -> None:
    assert chat(server, STARTER).status_code == 200
    own = psutil.Process().nice()
    assert [psutil.Process(server.pid_of(part)).nice() for part in ("router", "gguf")] == [own, own]


def test_f14_a_port_in_use_is_one_clear_line(server: Server) -> None:
    command = [sys.executable, "-m", "deployments.start.launcher"]
    environment = {"IMPETUS_PORT": str(server.port), "IMPETUS_HOME": str(server.home)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert str(server.port) in result.stderr
    assert "IMPETUS_PORT" in result.stderr


def test_a_public_address_without_a_key_is_refused(tmp_path: Path) -> None:
    environment = {"IMPETUS_HOST": "0.0.0.0", "IMPETUS_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "deployments.start.launcher"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "IMPETUS_API_KEY" in result.stderr


def test_f5_the_budget_evicts_the_idle_model_and_refuses_the_impossible(
    other_server: Server,
) -> None:
    shutil.copyfile(starter_path(), other_server.models / "copy-q4_1.gguf")
    other_server.start(
        MEMORY_BUDGET="350MiB", CONTEXT_LENGTH="1024", MAX_SEQUENCES="2", API_KEY="sesame"
    )
    with httpx.Client(
        base_url=other_server.url, headers={"authorization": "Bearer sesame"}, timeout=60
    ) as client:

        def ask(model: str) -> httpx.Response:
            messages = [{"role": "user", "content": "hi"}]
            body = {"model": model, "messages": messages, "max_tokens": 2}
            return client.post("/v1/chat/completions", json=body)

        def resident() -> set[str]:
            models = client.get("/v1/models").json()["data"]
            return {model["name"] for model in models if model["state"] == "resident"}

        assert ask(STARTER).status_code == 200
        assert resident() == {STARTER}
        assert ask("copy").status_code == 200
        assert resident() == {"copy"}
        assert ask(STARTER).status_code == 200
        assert resident() == {STARTER}
    assert chat(other_server, STARTER).status_code == 401
    assert other_server.stop() == 0


def test_a_model_larger_than_the_budget_is_refused_with_the_numbers(other_server: Server) -> None:
    other_server.start(MEMORY_BUDGET="64MiB")
    answer = chat(other_server, STARTER)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] in ("insufficient_memory", "backend_unavailable")
    assert "64.0 MiB" in answer.json()["error"]["message"]
    assert other_server.stop() == 0
