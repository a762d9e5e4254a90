"""A repository with a large file, and a transfer of it in this process."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from catalog.hub.client import HubClient
from catalog.hub.download.job import DownloadJob, partial_file
from catalog.hub.download.transfer import Pace, Transfer
from catalog.hub.entries import RepositoryFile
from catalog.hub.repository import read_repository
from scripts.hub_lib.server import Hub
from tests.unit.catalog.hub.conftest import LIMITS

SIZE = 1_000_000
LARGE = "m-Q8_0.gguf"


@dataclass
class Download:
    """A transfer into `work`, with what it told."""

    transfer: Transfer
    job: DownloadJob
    source: Path
    hub: Hub
    grown: list[int] = field(default_factory=list)
    waits: list[tuple[float, str]] = field(default_factory=list)

    def file(self, name: str = LARGE) -> RepositoryFile:
        return next(file for file in self.job.files if file.path == name)

    def fetch(self, name: str = LARGE) -> Path:
        """Fetch a file and return its path."""
        self.transfer.fetch(self.file(name))
        return self.transfer.work / name

    def hasten(self) -> None:
        """Give a silent connection up after 2 s."""
        self.transfer.client = HubClient(self.job.endpoint, "", replace(LIMITS, silence_s=2.0))

    @property
    def part(self) -> Path:
        """The large file while it is not whole."""
        path = partial_file(self.transfer.work, LARGE)
        path.parent.mkdir(exist_ok=True)
        return path

    @property
    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.transfer.work.rglob("*") if path.is_file())

    @property
    def content(self) -> bytes:
        return (self.source / LARGE).read_bytes()

    @property
    def ranges(self) -> list[str | None]:
        """The ranges that the file storage was asked for."""
        host = self.hub.cdn_origin.removeprefix("http://")
        return [each.headers.get("range") for each in self.hub.requests if each.host == host]


@pytest.fixture
def download(hub: Hub, client: HubClient, tmp_path: Path) -> Download:
    """A repository whose download has not begun; waits are noted, not waited."""
    source = tmp_path / "source"
    source.mkdir()
    (source / LARGE).write_bytes(b"GGUF" + os.urandom(SIZE - 4))
    (source / "config.json").write_text("{}")
    hub.publish("org/tiny", source)
    repository = read_repository(client, "org/tiny")
    target = tmp_path / "models" / "tiny"
    target.parent.mkdir()
    job = DownloadJob(client.endpoint, "org/tiny", repository.commit, repository.files, target)
    job.work.mkdir()
    grown: list[int] = []
    waits: list[tuple[float, str]] = []

    def on_wait(seconds: float, reason: str) -> None:
        waits.append((seconds, reason))

    asleep: Callable[[float], None] = lambda _: None  # noqa: E731
    transfer = Transfer(
        client, "org/tiny", job.commit, job.work, grown.append, on_wait, Pace(sleep=asleep)
    )
    hub.forget_requests()
    return Download(transfer, job, source, hub, grown, waits)
