"""Core ML keeps the interpreter's lock for long: its replica stays, and all else is answered."""

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.coreml_stand_in.install import StandIn
from tests.coreml_stand_in.plug_in import write_distribution
from tests.integration.server import HTTP, ROOT, Server, wait_until
from tests.unit.backends.coreml.test_coreml_backend import write_model

MODELS = ("first", "second")
# Serve replaces a process that fails three health checks in a row, so after 12 s.
HEALTH_CHECK = {"health_check_period_s": 1.0, "health_check_timeout_s": 4.0}
HOLD_S = 20.0
# The model is made so that the likeliest word after a word is the same one.
WORD = "town"


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    """The stand-in for coremltools, in a plug-in of the server."""
    return write_distribution(tmp_path / "plugins")


@pytest.fixture
def server(tmp_path: Path, stand_in: StandIn) -> Iterator[Server]:
    """A server with two Core ML models, whose format has a short health check."""
    plugins, models = stand_in.folder.parent, tmp_path / "models"
    (models / MODELS[0]).mkdir(parents=True)
    package = write_model(models / MODELS[0], "LlamaForCausalLM", "logits").parent
    shutil.copytree(models / MODELS[0], models / MODELS[1])
    for name in MODELS:
        folder = models / name
        (folder / package.name).rename(folder / f"{name}.mlpackage")
    inherited = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plugins), str(ROOT)])}
    server = Server(tmp_path / "home", models, inherited=inherited)
    launcher = (sys.executable, "-m", "deployments.start.launcher", str(write_config(tmp_path)))
    try:
        server.start(*launcher, FORMATS="coreml,echo", STARTERS="false")
        yield server
        assert server.stop() == 0
        assert server.survivors() == []
    finally:
        server.kill()


def write_config(folder: Path) -> Path:
    """Write the configuration with the health check of the Core ML format."""
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    content["applications"][0]["deployments"].append({"name": "coreml", **HEALTH_CHECK})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def post(server: Server, path: str, model: str, **body: Any) -> httpx.Response:
    body = {"model": model, "max_tokens": 1, "temperature": 0, **body}
    answer = HTTP.post(f"{server.url}/v1/{path}", json=body, timeout=180)
    assert answer.status_code == 200, answer.text
    return answer


def complete(server: Server, model: str) -> str:
    choices = post(server, "completions", model, prompt=WORD).json()["choices"]
    return str(choices[0]["text"]).strip()


def echoed(server: Server, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    answer = post(server, "chat/completions", "echo", messages=messages, max_tokens=100)
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_load_that_keeps_the_interpreters_lock_stops_nothing_else(
    server: Server, stand_in: StandIn
) -> None:
    first, second = MODELS
    assert complete(server, first) == WORD
    replica = server.pid_of("coreml")
    stand_in.set(open={"hold_s": HOLD_S})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, server, second)
        wait_until(lambda: len(stand_in.calls("open", "begin")) == 2, "the second model is opened")
        assert HTTP.get(f"{server.url}/healthz", timeout=60).status_code == 200
        assert echoed(server, "hello") == "hello"
        # It is in the same replica.
        assert complete(server, first) == WORD
        assert server.pid_of("coreml") == replica
        # All that while the lock was held.
        assert len(stand_in.calls("open")) == 1
        assert waiting.result() == WORD
    assert server.pid_of("coreml") == replica
    assert complete(server, first) == WORD
    # A replica that was replaced would have opened a model again.
    assert len(stand_in.calls("open", "begin")) == 2
