"""A listening server of the real application over fakes, and the command line beside it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from core.errors import ImpetusError, NotFound
from core.keys import MANAGEMENT_TOKEN, read_key
from router.app import create_app
from router.job_service import DownloadLimitsView, JobDetail, JobView, PartialView
from scripts.models_lib import progress
from scripts.models_lib.__main__ import main
from tests.fakes import FakeCatalog, make_services, make_view
from tests.live_server import serving
from tests.unit.router.api.test_router_api import FakeManagement
from tests.unit.router.api.test_router_hub import FakeHub
from tests.unit.router.api.test_router_jobs import JOB as RUNNING_JOB

JOB = RUNNING_JOB.model_copy(
    update={
        **{"done_bytes": 1024, "total_bytes": 4096, "bytes_per_s": 2048.0},
        **{"folder": "models/hub/org/tiny", "files": ()},
    }
)
DONE = JOB.model_copy(
    update={
        "state": "done",
        "done_bytes": 4096,
        "bytes_per_s": 0.0,
        "remaining_s": None,
        "ended_at": 3.0,
        "model_ids": ("tiny@gguf-q8_0",),
    }
)


class ScriptedJobs:
    """One job: `begun` answers a download, each later question takes the next of `script`."""

    def __init__(self) -> None:
        self.begun = JOB
        self.script: list[JobDetail | ImpetusError] = [DONE]
        self.calls: list[tuple[Any, ...]] = []
        self.left: list[PartialView] = []
        self.limits_view = DownloadLimitsView(parallel=1, bytes_per_s=0, hours="")

    async def jobs(self) -> Sequence[JobView]:
        ended = DONE.model_copy(update={"id": "b2", "title": "org/old: old.gguf"})
        shown = set(JobView.model_fields)
        return [JobView(**job.model_dump(include=shown)) for job in (self.begun, ended)]

    async def partials(self) -> Sequence[PartialView]:
        return self.left

    async def remove_partial(self, partial_id: str) -> None:
        if partial_id not in [one.id for one in self.left]:
            raise NotFound(f"There is no unfinished download {partial_id!r}.", param="id")
        self.left = []

    async def job(self, job_id: str) -> JobDetail:
        self.calls.append(("job", job_id))
        if job_id != JOB.id:
            raise NotFound(f"There is no job {job_id!r}.", param="id")
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, ImpetusError):
            raise answer
        return answer

    async def pause(self, job_id: str) -> JobDetail:
        return self._act("pause", job_id, "paused")

    async def resume(self, job_id: str) -> JobDetail:
        return self._act("resume", job_id, "queued")

    async def cancel(self, job_id: str) -> JobDetail:
        return self._act("cancel", job_id, "cancelled")

    async def move(self, job_id: str, before: str) -> JobDetail:
        self.calls.append(("move", job_id, before))
        return JOB

    async def download(self, model: str, revision: str, entry: str) -> JobDetail:
        self.calls.append(("download", model, revision, entry))
        return self.begun

    async def limits(self) -> DownloadLimitsView:
        return self.limits_view

    async def change_limits(self, changes: Mapping[str, Any]) -> DownloadLimitsView:
        self.calls.append(("limits", dict(changes)))
        self.limits_view = self.limits_view.model_copy(update=dict(changes))
        return self.limits_view

    def _act(self, name: str, job_id: str, state: str) -> JobDetail:
        self.calls.append((name, job_id))
        return JOB.model_copy(update={"state": state, "bytes_per_s": 0.0, "remaining_s": None})


@dataclass
class Shown:
    """What a run of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[list[str]]:
        """The words of each line."""
        return [line.split() for line in self.out.splitlines()]

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on standard output."""
        found: dict[str, Any] = json.loads(self.out)
        return found


Run: TypeAlias = Callable[..., Awaitable[Shown]]


@dataclass
class Stand:
    """The fakes behind the server, and its port."""

    jobs: ScriptedJobs = field(default_factory=ScriptedJobs)
    hub: FakeHub = field(default_factory=FakeHub)
    management: FakeManagement = field(default_factory=FakeManagement)
    catalog: FakeCatalog = field(default_factory=FakeCatalog)
    port: int = 0


@pytest.fixture
async def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    """A server that the settings name, with two models."""
    monkeypatch.setattr(progress, "_POLL_S", 0.0)
    big = make_view(
        "big@gguf-f16", state="unavailable", reason="It needs 90 GiB.", size_bytes=3 * 2**30
    )
    stand = Stand(catalog=FakeCatalog(make_view(aliases=("tiny", "coder")), big))
    services = replace(
        make_services(),
        catalog=stand.catalog,
        management=stand.management,
        jobs=stand.jobs,
        hub=stand.hub,
        management_token=read_key(tmp_path, MANAGEMENT_TOKEN),
    )
    async with serving(create_app(services)) as port:
        stand.port = port
        monkeypatch.setenv("IMPETUS_HOME", str(tmp_path))
        monkeypatch.setenv("IMPETUS_PORT", str(port))
        monkeypatch.delenv("IMPETUS_API_KEY", raising=False)
        yield stand


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line on a thread."""

    async def run_command(*arguments: str) -> Shown:
        capsys.readouterr()
        try:
            code = await asyncio.to_thread(main, arguments)
        except SystemExit as end:
            code = int(str(end.code))
        shown = capsys.readouterr()
        return Shown(code, shown.out, shown.err)

    return run_command
