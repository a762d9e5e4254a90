"""Starts and stops our server, and reads its metrics."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from core.keys import MANAGEMENT_TOKEN, read_key
from scripts.bench_lib.processes import (
    GatewaySnapshot,
    engine_worker_cpu_s,
    is_supported,
    main_thread_cpu_s,
    tree,
    tree_cpu_s,
)

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = "Impetus"
START_TIMEOUT_S = 240.0
# The launcher itself waits up to 45 s for its children.
STOP_TIMEOUT_S = 60.0
METRIC = re.compile(r"^(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


class BenchError(Exception):
    """The benchmark cannot continue; the message says why."""


@dataclass(frozen=True, slots=True)
class Load:
    """Options of both servers; counts are of tokens, threads and sequences.

    `model` is a file or a model's folder, the only model of its format there.
    """

    model: Path
    threads: int
    context: int
    sequences: int
    format: str = "gguf"

    @property
    def folder(self) -> Path:
        """The folder that our server scans for the model."""
        return self.model if self.model.is_dir() else self.model.parent


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its port, first process and reported facts."""

    name: str
    port: int
    model: str
    pid: int
    is_ours: bool = False
    format: str = "gguf"
    facts: dict[str, str] = field(default_factory=dict)
    management_token: str = field(default="", repr=False)

    def get(self, path: str) -> str:
        """Return the body of a GET request.  Raises OSError unless the status is 200."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())


@contextmanager
def running_ours(load: Load, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run our server on a free port with an empty home; yields when it is ready.

    `settings` are more settings, by environment variable.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        log = Path(folder) / "launch.log"
        variables = {
            "IMPETUS_THREADS": str(load.threads),
            "IMPETUS_CONTEXT_LENGTH": str(load.context),
            "IMPETUS_MAX_SEQUENCES": str(load.sequences),
            "IMPETUS_FORMATS": load.format,
            **(settings or {}),
        }
        process = launch(Path(folder), load.folder, port, variables, log)
        server = Server(OURS, port, "", process.pid, is_ours=True, format=load.format)
        try:
            wait_until_ready(server, process, log, "/readyz")
            home = Path(variables.get("IMPETUS_HOME", folder))
            token = read_key(home, MANAGEMENT_TOKEN)
            yield replace(server, model=model_id(server), management_token=token)
        except BenchError as error:
            if _answers(server):
                raise
            end = tail(Path(folder) / "logs" / "serve.log")
            raise BenchError(f"{error}\nIt no longer responds:\n{end}") from error
        finally:
            stop(process)


def launch(
    home: Path, models: Path, port: int, settings: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start our server with the models of one folder; its output is appended to `log`.

    `settings` are more settings, by environment variable.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("IMPETUS_")}
    environment = {
        **kept,
        "IMPETUS_HOME": str(home),
        "IMPETUS_PORT": str(port),
        "IMPETUS_MODELS_PATH": str(models),
        "IMPETUS_STARTERS": "false",
        "IMPETUS_DISCOVER": "",
        "IMPETUS_AUTO_CONVERT": "false",
        **settings,
    }
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "deployments.start.launcher"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def _answers(server: Server) -> bool:
    try:
        server.get("/healthz")
    except OSError:
        return False
    return True


def gateway_snapshot(server: Server) -> GatewaySnapshot | None:
    """Read both processes' CPU time; None if it is not available.

    Only llama.cpp's threads can be distinguished from ours by name.
    """
    if not (server.is_ours and server.format == "gguf" and is_supported()):
        return None
    # Read once: it costs the router as much CPU as many tokens.
    metrics = server.get("/metrics")
    pids = _process_ids(metrics)
    native = [
        float(value)
        for name, _, value in METRIC.findall(metrics)
        if name == "impetus_engine_native_cpu_seconds_total"
    ]
    if not native or not {"router", "gguf"} <= pids.keys():
        return None
    return GatewaySnapshot(
        tree_cpu_s(pids["router"]),
        tree_cpu_s(pids["gguf"]),
        sum(native),
        engine_worker_cpu_s(pids["gguf"]),
        main_thread_cpu_s(pids["router"]) + main_thread_cpu_s(pids["gguf"]),
    )


def process_ids(server: Server) -> dict[str, int]:
    """Return the processes of the router and of formats with a loaded model, by name."""
    return _process_ids(server.get("/metrics"))


def _process_ids(metrics: str) -> dict[str, int]:
    pids: dict[str, int] = {}
    for name, labels, value in METRIC.findall(metrics):
        if name == "impetus_process_pid":
            match = re.search(r'process="([^"]*)"', labels)
            pids[match[1] if match else ""] = int(float(value))
    return pids


def free_port() -> int:
    """Return a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(
    server: Server, process: subprocess.Popen[bytes], log: Path, path: str
) -> None:
    """Wait until `path` returns 200.  Raises BenchError with the end of the log."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"{server.name} ended with code {process.returncode}:\n{tail(log)}")
        try:
            server.get(path)
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
        else:
            return
    raise BenchError(f"{server.name} was not ready after {START_TIMEOUT_S:.0f} s:\n{tail(log)}")


def model_id(server: Server) -> str:
    """Return the id of the only model of the server's format.  Raises BenchError."""
    models = json.loads(server.get("/v1/models"))["data"]
    found = [model for model in models if model.get("format") == server.format]
    if len(found) != 1:
        names = [model["id"] for model in models]
        raise BenchError(
            f"expected exactly one {server.format} model that can run here; found {names}. "
            "/api/models has the reasons."
        )
    return str(found[0]["id"])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process, wait, and kill the rest of its process tree."""
    members = [psutil.Process(pid) for pid in tree(process.pid) if pid != process.pid]
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in members:
        # psutil compares start times, so a process with a reused id is not killed.
        with suppress(psutil.NoSuchProcess):
            member.kill()


def tail(log: Path) -> str:
    """Return the last lines of a log; empty if it does not exist."""
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
