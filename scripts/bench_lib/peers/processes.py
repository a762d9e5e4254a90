"""Starts and stops the benchmark's peers: other servers and bare loops."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench_lib.client import StreamRecord
from scripts.bench_lib.servers import (
    ROOT,
    BenchError,
    Load,
    Server,
    free_port,
    stop,
    tail,
    wait_until_ready,
)

MLX_SERVER = "mlx_lm.server"
_PACKAGES = {"onnx": "onnxruntime", "pytorch": "transformers"}


@dataclass(frozen=True, slots=True)
class _Child:
    """A child process that has printed its first line."""

    process: subprocess.Popen[bytes]
    facts: Mapping[str, str]
    log: Path


@dataclass(frozen=True, slots=True)
class BareLoop:
    """A runtime in a child process that serves one request at a time."""

    name: str
    version: str
    child: _Child

    def run(self, body: Mapping[str, Any]) -> StreamRecord:
        """Generate; blocks.  Raises BenchError if the child ended."""
        process = self.child.process
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"messages": body["messages"], "max_tokens": body["max_tokens"]}
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"{self.name} ended:\n{tail(self.child.log)}") from None
        line = process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} failed:\n{tail(self.child.log)}")
        return StreamRecord(**json.loads(line))


@contextmanager
def running_peer(load: Load) -> Iterator[Server]:
    """Run llama.cpp's server; yields when it has loaded the model."""
    arguments = ["--context", str(load.context), "--sequences", str(load.sequences)]
    with _running("scripts.bench_lib.peers.llama_server", load, arguments) as child:
        port = int(child.facts["url"].rpartition(":")[2])
        facts = {**child.facts, "version": f"xllamacpp {child.facts['version']}"}
        server = Server("llama.cpp", port, "peer", child.process.pid, facts=facts)
        server.get("/health")
        yield server


@contextmanager
def running_mlx_server(load: Load) -> Iterator[Server]:
    """Run mlx_lm.server with its defaults; it loads the model on the first request.

    Its model list is not requested: without a hub cache it closes the connection.
    """
    port = free_port()
    with _running("scripts.bench_lib.peers.mlx_server", load, ["--port", str(port)]) as child:
        server = Server(
            MLX_SERVER, port, "default_model", child.process.pid, format="mlx",
            facts=dict(child.facts),
        )  # fmt: skip
        wait_until_ready(server, child.process, child.log, "/health")
        yield server


@contextmanager
def running_bare(load: Load) -> Iterator[BareLoop]:
    """Run a bare loop over the format's runtime; yields when it has loaded the model."""
    with _running("scripts.bench_lib.peers.bare", load, ["--runtime", load.format]) as child:
        yield BareLoop(f"bare {_PACKAGES[load.format]}", child.facts["version"], child)


@contextmanager
def _running(module: str, load: Load, arguments: Sequence[str]) -> Iterator[_Child]:
    command = [
        *(sys.executable, "-m", module, "--model", str(load.model)),
        *("--threads", str(load.threads), *arguments),
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "peer.log"
        with log.open("w") as out:
            # Our launcher has its own session, which Linux may schedule as one group: the peer
            # needs one too, or other work on the machine would slow down only the peer.
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
                raise BenchError(f"{module} did not start:\n{tail(log)}")
            yield _Child(process, json.loads(line), log)
        finally:
            # A child that ended no longer reads its input.
            with suppress(BrokenPipeError):
                process.stdin.close()
            stop(process)
            process.stdout.close()
