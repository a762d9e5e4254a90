"""Starting, stopping, memory: on servers with settings of their own."""

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.integration.server import ROOT, STARTER, Server, endless_stream

KEY = {"authorization": "Bearer sesame"}


def chat(server: Server, model: str, **options: object) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return httpx.post(f"{server.url}/v1/chat/completions", json={**body, **options}, timeout=60)


def test_serve_run_by_hand_works_and_leaves_no_process(other_server: Server) -> None:
    serve = str(Path(sys.executable).with_name("serve"))
    other_server.start(serve, "run", "--address", "local", "serve_config.yaml")
    assert chat(other_server, STARTER).status_code == 200
    assert other_server.stop() == 0
    assert other_server.survivors() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_f10_a_signal_during_a_stream_leaves_no_process(
    limited: Server, number: signal.Signals
) -> None:
    # Prefixes of whole blocks are computed, and not written.
    story = "Write a long story. Nobody may touch a file of it before the first step. " * 20
    with endless_stream(limited, STARTER, story, KEY):
        assert limited.stop(number) == 0
    assert limited.survivors() == []
    assert not (limited.home / "cache" / "prefixes").exists()


def test_a_public_address_without_a_key_is_refused_n2(tmp_path: Path) -> None:
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
    assert result.returncode == 2
    for way in ("scripts/keys", "IMPETUS_API_KEY", "127.0.0.1"):
        assert way in result.stderr


def test_f5_the_budget_evicts_the_idle_model_and_refuses_the_impossible(
    limited: Server,
) -> None:
    with httpx.Client(base_url=limited.url, headers=KEY, timeout=60) as client:

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
    assert chat(limited, STARTER).status_code == 401


def test_a_model_larger_than_the_budget_is_refused_with_the_numbers(narrow: Server) -> None:
    answer = chat(narrow, STARTER)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] in ("insufficient_memory", "backend_unavailable")
    assert "64.0 MiB" in answer.json()["error"]["message"]
