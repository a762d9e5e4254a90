"""The process of long jobs over a test hub: downloads from what a user pastes to the scan."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from catalog.hub.client import HubClient
from catalog.hub.remote import Examine, RemoteModel
from catalog.hub.repository import HubRepository
from catalog.store import CatalogStore
from core.errors import (
    HubNotFound,
    HubTokenRejected,
    HubUnavailable,
    NotFound,
    RequestError,
    Unavailable,
)
from core.settings import Settings
from deployments.jobs.deployment import JobsReplica
from deployments.messages import ModelStates, SchedulerSnapshot
from router.job_service import DownloadLimitsView, JobDetail
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub, running_hub
from tests.unit.catalog.scan.folders import Shelf, write_model
from tests.unit.deployments.handles import FakeHandle, FakeMethod, answering

NAME = "tiny-Q8_0.gguf"
OTHER = "tiny-Q4_0.gguf"
LIMIT_S = 120.0


class Machine:
    """A scheduler's handle, and a home folder for the process."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, formats=["echo"], threads=1, starters=False)
        self.states = ModelStates(version=1)
        self.scheduler: Any = FakeHandle(
            model_states=self._tell,
            rescan=answering(None),
            snapshot=answering(SchedulerSnapshot(budget_bytes=1000, used_bytes=200)),
        )

    async def _tell(self, version: int) -> ModelStates:
        while version == self.states.version:
            await asyncio.sleep(0.01)
        return self.states

    @asynccontextmanager
    async def running(self) -> AsyncIterator[JobsReplica]:
        replica = JobsReplica(self.settings, self.scheduler)
        try:
            yield replica
        finally:
            await replica._supervisor.stop()
            replica.__del__()


def not_inspected(
    _client: HubClient, repository: HubRepository, _examine: Examine
) -> tuple[RemoteModel, ...]:
    return tuple(RemoteModel(entry, None, "It was not inspected.") for entry in repository.entries)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one repository of two quantizations."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("deployments.jobs.strain._POLL_PAUSE_S", 0.0)
    # The models of these tests are random bytes: nothing is known of them before a scan.
    monkeypatch.setattr("deployments.jobs.hub.inspect_repository", not_inspected)
    # The scheduler of these tests scans nothing, unless one has it scan.
    monkeypatch.setattr("deployments.jobs.catalog._REGISTER_LIMIT_S", 0.0)
    source = tmp_path / "source"
    source.mkdir()
    for name in (NAME, OTHER):
        (source / name).write_bytes(os.urandom(300_000))
    with running_hub() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.endpoint)
        running.publish("org/tiny", source)
        yield running


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home")


async def result(call: Awaitable[Any]) -> Any:
    """Return what a method answers; its error is raised, as the router's calls do."""
    found = await call
    if isinstance(found, Exception):
        raise found
    return found


async def until(replica: JobsReplica, job: JobDetail, state: str) -> JobDetail:
    async with asyncio.timeout(LIMIT_S):
        while (found := await result(replica.job(job.id))).state != state:
            await asyncio.sleep(0.02)
    assert isinstance(found, JobDetail)
    return found


async def test_download_ends_in_a_scan(hub: Hub, machine: Machine, tmp_path: Path) -> None:
    async with machine.running() as replica:
        job = await result(replica.download("org/tiny:Q8_0", "", ""))
        assert (job.state, job.repository) == ("queued", "org/tiny")
        done = await until(replica, job, "done")
        assert (done.done_bytes, done.total_bytes, done.bytes_per_s) == (300_000, 300_000, 0.0)
        folder = tmp_path / "home" / "models" / "hub" / "org" / "tiny-q8_0-gguf"
        assert done.folder == str(folder)
        assert (folder / NAME).read_bytes() == (tmp_path / "source" / NAME).read_bytes()
        assert machine.scheduler.rescan.calls == [()]
        assert [file.path for file in done.files] == [NAME]
        # What is there already is not fetched again.
        hub.faults.add(Fault("status", file=NAME, value="500"))
        again = await result(replica.download("org/tiny:Q8_0", "", ""))
        assert again.id != job.id
        await until(replica, again, "done")
        # Of what a user changed nothing is told to be there.
        (folder / NAME).write_bytes(b"shorter")
        with pytest.raises(RequestError, match="move it away"):
            await result(replica.download("org/tiny:Q8_0", "", ""))
        found = await result(replica.repository("org/tiny", "", 16))
        assert not any(entry.is_downloaded for entry in found.entries)
        (folder / NAME).unlink()
        with pytest.raises(RequestError, match="lacks files of org/tiny, or has others"):
            await result(replica.download("org/tiny:Q8_0", "", ""))
        (folder / "download.json").unlink()
        with pytest.raises(RequestError, match="has another revision"):
            await result(replica.download("org/tiny:Q8_0", "", ""))


async def test_model_is_in_the_catalog_when_its_job_is_done_and_a_broken_one_is_removed(
    hub: Hub, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M: what the scan refuses ends its job with the reason and leaves nothing."""
    monkeypatch.setattr("deployments.jobs.catalog._REGISTER_LIMIT_S", LIMIT_S)
    hub.publish("org/whole", write_model(tmp_path / "whole"))
    shelf = Shelf(tmp_path / "home", CatalogStore(machine.settings.catalog_file))

    async def scan() -> None:
        await asyncio.to_thread(shelf.scan)

    machine.scheduler.rescan = FakeMethod(scan)
    async with machine.running() as replica:
        job = await result(replica.download("org/whole", "", "model.safetensors"))
        done = await until(replica, job, "done")
        assert done.model_ids == ("whole@safetensors-f32",)
        # Random bytes are no model.
        broken = await result(replica.download("org/tiny:Q8_0", "", ""))
        failed = await until(replica, broken, "failed")
        assert failed.code == "broken_model"
        assert failed.reason.startswith("tiny-q8_0-gguf cannot be used here: ")
        folder = Path(failed.folder)
        assert list(folder.parent.iterdir()) == [Path(done.folder)]
    shelf.store.close()


async def test_second_download_joins_and_another_waits_its_turn_d7(
    hub: Hub, machine: Machine
) -> None:
    hub.faults.add(Fault("stall", file=NAME, at=100_000))
    async with machine.running() as replica:
        first = await result(replica.download("org/tiny:Q8_0", "", ""))
        running = await until(replica, first, "running")
        address = f"{hub.endpoint}/org/tiny/blob/main/{NAME}"
        joined = await result(replica.download(address, "", ""))
        assert joined.id == running.id
        second = await result(replica.download("org/tiny", "main", OTHER))
        assert [job.id for job in await result(replica.jobs())] == [first.id, second.id]
        moved = await result(replica.move(second.id, first.id))
        assert [job.id for job in await result(replica.jobs())] == [moved.id, first.id]
        paused = await result(replica.pause(first.id))
        assert paused.state == "paused"
        await until(replica, second, "done")
        cancelled = await result(replica.cancel(first.id))
        assert cancelled.state == "cancelled"
        work = Path(first.folder).with_name(f".{Path(first.folder).name}.download")
        async with asyncio.timeout(LIMIT_S):
            while work.exists():
                await asyncio.sleep(0.02)


async def test_jobs_of_an_earlier_process_go_on(hub: Hub, machine: Machine) -> None:
    stall = Fault("stall", file=NAME, at=100_000, times=1)
    hub.faults.add(stall)
    async with machine.running() as replica:
        job = await result(replica.download("org/tiny:Q8_0", "", ""))
        await until(replica, job, "running")
    async with machine.running() as replica:
        assert (await until(replica, job, "done")).id == job.id


async def test_strain_holds_downloads_back(hub: Hub, machine: Machine) -> None:
    del hub
    machine.states = ModelStates(strain="low power mode is on", keeps_cool=True, version=2)
    async with machine.running() as replica:
        while not replica._strain.states.strain:
            await asyncio.sleep(0.01)
        job = await result(replica.download("org/tiny:Q8_0", "", ""))
        await asyncio.sleep(0.1)
        held = await result(replica.job(job.id))
        assert (held.state, held.reason) == ("queued", "low power mode is on")
        machine.states = ModelStates(version=3)
        await until(replica, job, "done")


async def test_limits_apply_to_what_runs_and_are_kept(hub: Hub, machine: Machine) -> None:
    hub.faults.add(Fault("stall", file="*.gguf", at=100_000))
    async with machine.running() as replica:
        first = await result(replica.download("org/tiny:Q8_0", "", ""))
        second = await result(replica.download("org/tiny:Q4_0", "", ""))
        await until(replica, first, "running")
        assert (await result(replica.job(second.id))).state == "queued"
        limits = await result(replica.change_limits({"parallel": 2, "bytes_per_s": 100_000}))
        assert (limits.parallel, limits.bytes_per_s, limits.hours) == (2, 100_000, "")
        for job in (first, second):
            await until(replica, job, "running")
        # A job runs a moment before its download does.
        while replica._downloads.share_bytes_per_s() != 50_000:
            await asyncio.sleep(0.01)
        now = datetime.now()
        later = [f"{now + timedelta(hours=hours):%H:%M}" for hours in (2, 3)]
        await result(replica.change_limits({"hours": "-".join(later)}))
        for job in (first, second):
            found = await until(replica, job, "waiting")
            assert found.reason == "it is outside of the hours that are set"
        with pytest.raises(RequestError, match="are not hours"):
            await result(replica.change_limits({"hours": "late"}))
    async with machine.running() as replica:
        assert await result(replica.limits()) == DownloadLimitsView(
            parallel=2, bytes_per_s=100_000, hours="-".join(later)
        )
        assert (await result(replica.change_limits({"hours": None}))).hours == ""
        for job in (first, second):
            await until(replica, job, "running")


async def test_token_is_stored_once_the_hub_knows_it(
    hub: Hub, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catalog.hub.token.get_token", lambda: None)
    hub.add_user("jane", "hf_good")
    file = machine.settings.home / "keys" / "hub_token"
    async with machine.running() as replica:
        assert (await result(replica.token())).source == ""
        with pytest.raises(HubTokenRejected):
            await result(replica.store_token("hf_unknown"))
        with pytest.raises(RequestError, match="1 to 512 characters"):
            await result(replica.store_token("two words"))
        assert not file.exists()
        stored = await result(replica.store_token(" hf_good "))
        assert (stored.source, stored.owner) == ("stored", "jane")
        assert (await result(replica.token())).source == "stored"
        assert file.stat().st_mode & 0o777 == 0o600
        assert (await result(replica.remove_token())).source == ""
        assert not file.exists()


@pytest.mark.parametrize(
    ("model", "revision", "entry", "error", "message"),
    [
        ("org/none", "", "", HubNotFound, "has no org/none"),
        ("org/tiny:Q2_K", "", "", RequestError, "It has: q"),
        ("org/tiny", "../../x", "", RequestError, "not a revision"),
        ("org/../tiny", "", "", RequestError, "not a model on the Hugging Face Hub"),
        ("http://127.0.0.1:1/m.gguf", "", "", RequestError, "this machine or a private network"),
        ("https://example.com/m.gguf", "main", "", RequestError, "not for an address"),
        ("org/tiny", "", "", RequestError, "Nothing of org/tiny was chosen"),
    ],
)
async def test_what_cannot_be_downloaded_makes_no_job(
    hub: Hub,
    machine: Machine,
    model: str,
    revision: str,
    entry: str,
    error: type[Exception],
    message: str,
) -> None:
    del hub
    async with machine.running() as replica:
        with pytest.raises(error, match=message):
            await result(replica.download(model, revision, entry))
        assert await result(replica.jobs()) == []
        with pytest.raises(NotFound, match="There is no job 'none'"):
            await result(replica.job("none"))


async def test_hub_that_is_down_is_told(
    hub: Hub, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    async with machine.running() as replica:
        with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1:9 cannot be reached"):
            await result(replica.download("org/tiny", "", ""))


async def test_store_that_cannot_be_opened_is_told_and_tried_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.jobs.calls.jobs._LOAD_LIMIT_S", 0.2)
    path = machine.settings.home / "jobs.sqlite"
    path.mkdir(parents=True)
    async with machine.running() as replica:
        with pytest.raises(Unavailable, match="cannot be opened"):
            await result(replica.jobs())
        await replica.check_health()
        path.rmdir()
        async with asyncio.timeout(LIMIT_S):
            while isinstance(await replica.jobs(), Exception):
                await asyncio.sleep(0.05)
