"""Runs the server of a soak test in folders of its own and starts it again after it ended."""

import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from scripts.bench_lib.servers import METRIC, START_TIMEOUT_S, launch, stop, tail

END_LIMIT_S = 30.0
_POLL_S = 0.2


class SoakError(Exception):
    """The soak test cannot continue; the message says why."""


@dataclass
class Server:
    """The server under test: its folders, port, settings (`IMPETUS_` variables) and process."""

    home: Path
    models: Path
    port: int
    settings: Mapping[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    members: dict[int, psutil.Process] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The root of the HTTP API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def launch_log(self) -> Path:
        """What the launcher prints."""
        return self.home / "launch.log"

    def start(self) -> None:
        """Start and wait until ready.  Raises SoakError."""
        started = time.monotonic()
        self.process = launch(self.home, self.models, self.port, self.settings, self.launch_log)
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                raise SoakError(f"The server did not start:\n{tail(self.launch_log)}")
            time.sleep(_POLL_S)
        self.note_members()

    def is_ready(self) -> bool:
        """Whether /readyz returns 200."""
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def note_members(self) -> list[psutil.Process]:
        """Return the processes of the tree, and remember them for `survivors`."""
        assert self.process is not None
        try:
            root = psutil.Process(self.process.pid)
            found = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.members.update({one.pid: one for one in found})
        return found

    def wait_for_end(self, limit_s: float = END_LIMIT_S) -> int | None:
        """Return the exit code of a server that ends by itself; None if it still runs then."""
        assert self.process is not None
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def survivors(self, limit_s: float = 10.0) -> list[psutil.Process]:
        """Return the processes that are left `limit_s` seconds after the server's end."""
        _, alive = psutil.wait_procs(list(self.members.values()), timeout=limit_s)
        return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def stop(self) -> None:
        """Stop the server and kill what is left of it."""
        if self.process is not None:
            self.note_members()
            stop(self.process)
        for one in self.survivors(limit_s=1.0):
            one.kill()


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start the server; stop it at the end, whatever happens."""
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Metrics:
    """One reading of `/metrics`; values by name and by one label's value."""

    def __init__(self, text: str) -> None:
        self._text = text

    def values(self, name: str) -> dict[str, float]:
        """Return a metric's values by the value of its first label, "" without one."""
        found = {}
        for metric, labels, value in METRIC.findall(self._text):
            if metric == name:
                match = re.search(r'="([^"]*)"', labels)
                found[match[1] if match else ""] = float(value)
        return found

    def value(self, name: str) -> float:
        """Return the value of a metric without labels.  Raises KeyError."""
        return self.values(name)[""]


async def read_metrics(client: httpx.AsyncClient) -> Metrics:
    """Read `/metrics`.  Raises httpx.HTTPError."""
    answer = await client.get("/metrics", timeout=30)
    answer.raise_for_status()
    return Metrics(answer.text)
