"""The test hub as a program of its own, used through HF_ENDPOINT and its control routes."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.hub_lib.__main__ import main
from scripts.hub_lib.faults import Fault, parse_fault

ROOT = Path(__file__).parents[4]
DOWNLOAD = """
from huggingface_hub import hf_hub_download
print(open(hf_hub_download("org/tiny", "config.json")).read())
"""


@pytest.fixture
def endpoint(folder: Path) -> Iterator[str]:
    """The address of `scripts/hub` with one more repository and a fault."""
    command = [sys.executable, "-m", "scripts.hub_lib", "--port=0", f"--publish=org/tiny={folder}"]
    fault = "--fault=status,value=503,file=search,times=1"
    with subprocess.Popen([*command, fault], cwd=ROOT, stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdout is not None
        name, _, address = hub.stdout.readline().strip().partition("=")
        assert name == "HF_ENDPOINT"
        yield address
        hub.send_signal(signal.SIGINT)
        assert hub.wait(30) == 0


def ask(address: str, method: str = "GET", body: bytes | None = None) -> Any:
    request = urllib.request.Request(address, method=method, data=body)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_hub_script_has_faults_and_starters(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match="503"):
        ask(f"{endpoint}/api/models")
    names = {each["id"] for each in ask(f"{endpoint}/api/models")}
    assert names >= {"org/tiny", "test/gated", "test/SmolLM2-135M-Instruct"}
    control = f"{endpoint}/_control"
    assert [fault["kind"] for fault in ask(f"{control}/faults")] == ["status"]
    assert ask(f"{control}/faults", "DELETE") == []
    (added,) = ask(f"{control}/faults", "POST", b"drop,repository=other/*")
    assert (added["kind"], added["repository"]) == ("drop", "other/*")
    ask(f"{control}/requests", "DELETE")
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["model_type"] == "llama"
    asked = [(each["method"], each["status"]) for each in ask(f"{control}/requests")]
    assert ("HEAD", 307) in asked
    assert ("GET", 200) in asked


def test_hub_fault_is_read_from_text() -> None:
    read = parse_fault("stall,file=*.gguf,at=1000,seconds=2.5,times=1,repository=a/*,value=x")
    assert read == Fault("stall", "a/*", "*.gguf", 1000, "x", 2.5, 1)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--fault=nonsense", "'nonsense' is not a fault; choose one of status, drop"),
        ("--fault=stall,when=now", "'when=now' is not NAME=VALUE with one of repository"),
        ("--fault=stall,at=soon", "at is 'soon', which is not a number"),
        ("--publish=org/tiny", "write OWNER/NAME=FOLDER with an existing folder"),
    ],
)
def test_hub_script_says_what_is_wrong(
    argument: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.pthread_sigmask", lambda *_: set())
    assert main([argument]) == 1
    assert said in capsys.readouterr().err
