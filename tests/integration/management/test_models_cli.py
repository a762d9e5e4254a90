"""From an empty home to an answer with `scripts/models`, over a kill of the server."""

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub
from tests.integration.management.nice_hub import ID, NAME, nice_hub
from tests.integration.server import HTTP, ROOT, Server, wait_until
from tests.live_server import free_port
from tests.starter import starter_path

WANTED = "hf.co/org/Nice-GGUF:Q4_1"
PAGE_BYTES = 1_000_000
LIMIT_S = 120


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with nice_hub(tmp_path) as hub:
        yield hub


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.models_lib", *arguments]


def environment(server: Server) -> dict[str, str]:
    own = {"IMPETUS_HOME": str(server.home), "IMPETUS_PORT": str(server.port)}
    return {**os.environ, **own}


def run(server: Server, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(server),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def document(server: Server, *arguments: str) -> Any:
    done = run(server, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def arrived(server: Server) -> int:
    return sum(int(job["done_bytes"]) for job in document(server, "jobs")["jobs"])


def begin_and_leave(hub: Hub, server: Server) -> None:
    """Begin a slow download and press Ctrl-C in the middle; it goes on."""
    hub.faults.add(Fault("slow", file=NAME, value=str(4 * PAGE_BYTES)))
    hub.forget_requests()
    getting = subprocess.Popen(
        command("get", WANTED),
        cwd=ROOT,
        env=environment(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell ignores for its background jobs must reach this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_until(lambda: arrived(server) > 5 * PAGE_BYTES, "a part has arrived", LIMIT_S)
    getting.send_signal(signal.SIGINT)
    out, err = getting.communicate(timeout=LIMIT_S)
    assert (getting.returncode, out) == (130, "")
    assert "goes on in the server" in err
    before = arrived(server)
    wait_until(lambda: arrived(server) > before, "the download goes on without its command")


def ask(server: Server) -> None:
    """Have the model answer under an alias."""
    assert document(server, "alias", "set", "coder", ID)["model"] == ID
    body = {
        "model": "coder",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
    }
    answer = HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=LIMIT_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def send(server: Server, folder: Path) -> None:
    """Upload a file, which becomes a model."""
    file = folder / "Sent-135M-Q4_1.gguf"
    shutil.copyfile(starter_path(), file)
    sent = run(server, "add", str(file), "--upload")
    assert (sent.returncode, sent.stdout) == (0, "Ready: sent-135m@gguf-q4_1 (93.8 MiB)\n"), (
        sent.stderr
    )
    assert document(server, "uploads")["uploads"] == []


def get_by_url(server: Server, folder: Path, port: int) -> None:
    """Get a model from a file server of this network, which the settings name."""
    shared = folder / "shared"
    shared.mkdir()
    shutil.copyfile(starter_path(), shared / "Shared-135M-Q4_1.gguf")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shared))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        got = run(server, "get", f"http://localhost:{port}/Shared-135M-Q4_1.gguf")
        files.shutdown()
    assert (got.returncode, got.stdout) == (0, "Ready: shared-135m@gguf-q4_1 (93.8 MiB)\n"), (
        got.stderr
    )


def test_model_is_got_over_ctrl_c_and_a_killed_server(
    hub: Hub, other_server: Server, tmp_path: Path
) -> None:
    server = other_server
    unreachable = run(server, "list")
    assert (unreachable.returncode, "scripts/serve" in unreachable.stderr) == (3, True)
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    server.inherited = {**kept, "HF_ENDPOINT": hub.endpoint}
    port = free_port()
    settings = {
        **{"STARTERS": "false", "FORMATS": "gguf,echo", "SCAN_INTERVAL_S": "600"},
        "DOWNLOAD_HOSTS": f"localhost:{port}",
    }
    server.start(**settings)
    (found,) = document(server, "search", "nice", "--format", "gguf", "--max-size", "4GB")["models"]
    assert found["id"] == "org/Nice-GGUF"
    shown = run(server, "show", WANTED, "--context", "512")
    assert f"Best here: {NAME}" in shown.stdout, shown.stderr

    begin_and_leave(hub, server)
    assert server.process is not None
    server.tree = psutil.Process(server.process.pid).children(recursive=True)
    server.kill()
    assert run(server, "get", WANTED).returncode == 3
    server.start(**settings)
    listed = document(server, "list")
    assert [job["title"] for job in listed["arriving"]] == [f"org/Nice-GGUF: {NAME}"]
    hub.faults.clear()
    again = run(server, "get", WANTED)
    assert (again.returncode, again.stdout) == (0, f"Ready: {ID} (93.8 MiB)\n"), again.stderr
    ranges = [each.headers.get("range") for each in hub.requests if "repos" in each.target]
    # Besides them the model's header is read, in a range with an end.
    whole = [one for one in ranges if one is None or one.endswith("-")]
    assert whole[0] is None
    assert len(whole) == 2
    assert whole[1] not in (None, "bytes=0-")
    (line,) = [line for line in run(server, "list").stdout.splitlines() if line.startswith(ID)]
    assert line.split()[-1] == "ready"

    ask(server)
    gone = document(server, "rm", "coder", "--yes")
    assert [model["id"] for model in document(server, "list", "nice")["models"]] == []
    assert document(server, "restore", gone["id"])["model"] == ID
    assert document(server, "rm", ID, "--yes")["model"] == ID
    anew = run(server, "get", WANTED)
    assert (anew.returncode, anew.stdout) == (0, f"Ready: {ID} (93.8 MiB)\n"), anew.stderr
    send(server, tmp_path)
    get_by_url(server, tmp_path, port)
    assert server.stop() == 0
