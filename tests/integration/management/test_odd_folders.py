"""A server whose repository, environment and data are in folders with long names and spaces."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.server import ROOT, STARTER, Server, wait_until

ROOMS = ("backends", "catalog", "core", "deployments", "router", "scheduler", "scripts")


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Server]:
    """A server as launchd would start it: few variables, and macOS' folder for temporary files."""
    root = tmp_path / "Application Support" / "my impetus (1)"
    root.mkdir(parents=True)
    for room in ROOMS:
        # With what was compiled, which every process of the server would compile again.
        shutil.copytree(ROOT / room, root / room)
    for name in ("pyproject.toml", "serve_config.yaml"):
        shutil.copy(ROOT / name, root / name)
    (root / ".venv").symlink_to(sys.prefix)
    # As long as macOS' own.
    temporary = Path(tempfile.mkdtemp(prefix="of-a-user-zyxvpxvq6csfxvn_n00000000-", dir="/tmp"))
    assert len(str(temporary)) >= 48
    environment = {
        "HOME": str(tmp_path / "home of a user"),
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "TMPDIR": str(temporary),
        # Ray's rule on macOS; on Linux it would take TMPDIR.
        "RAY_TMPDIR": "/tmp",
        "XPC_SERVICE_NAME": "org.example.impetus",
    }
    home, models = tmp_path / ("home " + "n" * 100), tmp_path / "models of mine"
    models.mkdir()
    server = Server(home, models, root=root, inherited=environment)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(temporary)


def chat(server: Server) -> httpx.Response:
    body = {"model": STARTER, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=90)


def test_a_server_in_folders_with_long_names_and_spaces(odd: Server) -> None:
    assert len(str(odd.home)) > 150
    odd.start(str(odd.root / ".venv" / "bin" / "python"), "-m", "deployments.start.launcher")
    assert chat(odd).status_code == 200
    replica = psutil.Process(odd.pid_of("gguf"))
    replica.send_signal(signal.SIGKILL)
    wait_until(lambda: chat(odd).status_code == 200, "the replaced process answers", 90)
    assert odd.pid_of("gguf") != replica.pid
    assert odd.stop() == 0
    assert odd.survivors() == []
