"""Starts and stops the two servers, and asks ours for what it knows about itself."""

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from scripts.bench_lib.processes import (
    GatewaySnapshot,
    engine_worker_cpu_s,
    is_supported,
    tree,
    tree_cpu_s,
)

ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT_S = 240.0
# The launcher itself waits up to 45 s for its children.
STOP_TIMEOUT_S = 60.0
METRIC = re.compile(r"^(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Load:
    """What both servers are started with; counts are of tokens, threads and sequences."""

    model: Path
    threads: int
    context: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it listens, its first process, and what it says about itself."""

    name: str
    port: int
    model: str
    pid: int
    is_ours: bool = False
    facts: dict[str, str] = field(default_factory=dict)

    def get(self, path: str) -> str:
        """Return the body of a GET; raises OSError when the status is not 200."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())


@contextmanager
def running_peer(load: Load) -> Iterator[Server]:
    """Run llama.cpp's server; it has loaded the model when this yields."""
    command = [
        *(sys.executable, "-m", "scripts.bench_lib.peer", "--model", str(load.model)),
        *("--threads", str(load.threads), "--context", str(load.context)),
        *("--sequences", str(load.sequences)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "peer.log"
        with log.open("w") as out:
            # Our launcher has a session of its own, which Linux may schedule as one group: so
            # must the peer, or other work on the machine would slow the peer alone.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                start_new_session=True,
            )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise BenchError(f"the peer did not start:\n{_tail(log)}")
            facts: dict[str, str] = json.loads(line)
            port = int(facts["url"].rpartition(":")[2])
            server = Server("llama.cpp", port, "peer", process.pid, facts=facts)
            server.get("/health")
            yield server
        finally:
            process.stdin.close()
            _stop(process)
            process.stdout.close()


@contextmanager
def running_ours(load: Load) -> Iterator[Server]:
    """Run this server on a free port with an empty home; it is ready when this yields."""
    port = _free_port()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("IMPETUS_")}
        environment = {
            **kept,
            "IMPETUS_HOME": folder,
            "IMPETUS_PORT": str(port),
            "IMPETUS_THREADS": str(load.threads),
            "IMPETUS_CONTEXT_LENGTH": str(load.context),
            "IMPETUS_MAX_SEQUENCES": str(load.sequences),
            "IMPETUS_MODELS_PATH": str(load.model.parent),
            "IMPETUS_STARTERS": "false",
        }
        log = Path(folder) / "launch.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "deployments.launch"],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            server = Server("Impetus", port, "", process.pid, is_ours=True)
            _wait_until_ready(server, process, log)
            yield replace(server, model=_model_id(server))
        finally:
            _stop(process)


def gateway_snapshot(server: Server) -> GatewaySnapshot | None:
    """Read both processes' CPU time; None where the machine or the server does not tell."""
    if not (server.is_ours and is_supported()):
        return None
    pids: dict[str, int] = {}
    native: list[float] = []
    for name, labels, value in METRIC.findall(server.get("/metrics")):
        if name == "impetus_process_pid":
            match = re.search(r'process="([^"]*)"', labels)
            pids[match[1] if match else ""] = int(float(value))
        elif name == "impetus_engine_native_cpu_seconds_total":
            native.append(float(value))
    if not native or not {"router", "gguf"} <= pids.keys():
        return None
    return GatewaySnapshot(
        tree_cpu_s(pids["router"]),
        tree_cpu_s(pids["gguf"]),
        sum(native),
        engine_worker_cpu_s(pids["gguf"]),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"the server ended with code {process.returncode}:\n{_tail(log)}")
        try:
            server.get("/readyz")
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
        else:
            return
    raise BenchError(f"the server was not ready after {START_TIMEOUT_S:.0f} s:\n{_tail(log)}")


def _model_id(server: Server) -> str:
    models = json.loads(server.get("/v1/models"))["data"]
    found = [model["id"] for model in models if model.get("format") == "gguf"]
    if len(found) != 1:
        raise BenchError(f"the model's folder must hold exactly one GGUF model; found {found}")
    return str(found[0])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process, wait, and kill what of its own tree is left then."""
    members = [psutil.Process(pid) for pid in tree(process.pid) if pid != process.pid]
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in members:
        # psutil compares start times, so a process that reuses the number is safe.
        with suppress(psutil.NoSuchProcess):
            member.kill()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
