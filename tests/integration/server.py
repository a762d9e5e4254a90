"""A real server, started as a user starts it, for tests to talk to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from core.keys import MANAGEMENT_TOKEN, read_key
from tests.live_server import free_port

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 120.0
STARTER = "smollm2-135m-instruct"
# `httpx.get` reads the system's certificates at every call: 25 ms of CPU, which polling repeats.
HTTP = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0))


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    """Return as soon as `condition` holds; fail after `limit_s`."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit_s:g} s: {what}")
        time.sleep(0.05)


def _obey_signals() -> None:
    """Undo what whoever runs the tests ignores, as `nohup` and background jobs of a shell do."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Server:
    """One running server with a home of its own; `models` is a folder that it scans.

    `root` is the repository; `inherited` is the environment besides the settings, by default ours.
    """

    home: Path
    models: Path
    port: int = field(default_factory=free_port)
    root: Path = ROOT
    inherited: Mapping[str, str] | None = None
    process: "subprocess.Popen[str] | None" = None
    tree: list[psutil.Process] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The server's root."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def managing(self) -> dict[str, str]:
        """The headers with which a client may manage the server."""
        return {"x-impetus-token": read_key(self.home, MANAGEMENT_TOKEN)}

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def start(self, *command: str, **settings: str) -> None:
        """Start and wait until ready; `settings` become IMPETUS_ variables."""
        values = {
            "HOME": str(self.home),
            "PORT": str(self.port),
            "MODELS_PATH": str(self.models),
            # What other programs have on this machine is not part of a test.
            "DISCOVER": "",
            "THREADS": "1",
            **settings,
        }
        own = {f"IMPETUS_{key}": value for key, value in values.items()}
        if self.process is not None and self.process.stdout is not None:
            # The server is started anew.
            self.process.stdout.close()
        self.process = subprocess.Popen(
            command or (sys.executable, "-m", "deployments.start.launcher"),
            cwd=self.root,
            env={**(os.environ if self.inherited is None else self.inherited), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_obey_signals,
        )
        self.wait_until_ready()
        self.tree = psutil.Process(self.process.pid).children(recursive=True)

    def wait_until_ready(self) -> None:
        """Return once /readyz says so; fail with the server's words when it ends before."""
        process = self.process
        assert process is not None

        def is_ready() -> bool:
            if process.poll() is not None:
                output = process.stdout.read() if process.stdout else ""
                raise AssertionError(f"the server ended with {process.returncode}:\n{output}")
            try:
                return HTTP.get(f"{self.url}/readyz", timeout=2).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, "the server is ready", START_LIMIT_S)

    def wait_for_models(self, *ids: str) -> dict[str, dict[str, Any]]:
        """Return the entries of /v1/models by id once these are among them."""
        found: dict[str, dict[str, Any]] = {}

        def are_listed() -> bool:
            # An unknown name makes the server look at its folders, at most every ten seconds.
            unknown = {"model": "nobody", "input": "x"}
            HTTP.post(f"{self.url}/v1/embeddings", json=unknown, timeout=120)
            entries = HTTP.get(f"{self.url}/v1/models", timeout=120).json()["data"]
            found.update((entry["id"], entry) for entry in entries)
            return found.keys() >= set(ids)

        wait_until(are_listed, f"{', '.join(ids)} are listed", 120)
        return found

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        assert self.process is not None
        self.tree = psutil.Process(self.process.pid).children(recursive=True) or self.tree
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def survivors(self) -> list[psutil.Process]:
        """Return the processes of the server that still run, after up to 30 s."""
        _, alive = psutil.wait_procs(self.tree, timeout=30)
        return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """End everything at once; for the end of a failed test."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self.tree:
            if process.is_running():
                process.kill()
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()

    def metric(self, name: str, **labels: str) -> float | None:
        """Return a metric's value, or None where it is not shown."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in HTTP.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(label in head for label in wanted):
                return float(value)
        return None

    def shown(self, name: str, **labels: str) -> float:
        """Return a metric's value; a part of the server that is late is asked again."""
        found: list[float] = []

        def is_shown() -> bool:
            value = self.metric(name, **labels)
            found.extend([] if value is None else [value])
            return bool(found)

        # A busy part that does not answer within 2 s is left out of one page of metrics.
        wait_until(is_shown, f"the metrics show {name} of {labels}")
        return found[-1]

    def pid_of(self, process: str) -> int:
        """Return the process id of a part of the server."""
        return int(self.shown("impetus_process_pid", process=process))

    def running_sequences(self) -> int:
        """Return how many sequences the starter, which is loaded, is generating."""
        return int(self.shown("impetus_engine_running_sequences", model=f"{STARTER}@gguf-q4_1"))


@contextmanager
def endless_stream(
    server: Server, model: str, question: str, headers: Mapping[str, str] | None = None
) -> Iterator[Iterator[str]]:
    """Ask for an answer without an end; gives its lines after the first."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "max_tokens": 4000,
        "logit_bias": {"2": -100, "0": -100},
    }
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        # An iterator that is dropped closes its connection.
        lines = answer.iter_lines()
        next(lines)
        yield lines
