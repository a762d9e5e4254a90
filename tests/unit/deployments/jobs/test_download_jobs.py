"""Downloads as jobs: the kill -9 of the process that runs them, and what is there already."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from catalog.hub.client import HubClient
from catalog.hub.download.job import DownloadJob
from catalog.hub.download.record import record_of
from catalog.hub.download.run import arrived_bytes
from catalog.hub.entries import RepositoryFile
from catalog.hub.repository import read_repository
from catalog.job_store import JobStore
from catalog.jobs import Job, JobLimits
from core.errors import BrokenModel
from deployments.jobs.downloads import DownloadJobs
from deployments.jobs.runner import JobRunner
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import running_hub

ROOT = Path(__file__).parents[4]
NAME = "m-Q8_0.gguf"
CHILD = """
import asyncio, sys
from pathlib import Path
from catalog.job_store import JobStore
from catalog.jobs import JobLimits
from deployments.jobs.downloads import DownloadJobs
from deployments.jobs.runner import JobRunner

async def main():
    handlers = {"download": DownloadJobs(lambda: "")}
    runner = JobRunner(JobStore(Path(sys.argv[1])), handlers, JobLimits)
    task = asyncio.create_task(runner.run())
    runner.add("download", "Tiny", sys.stdin.read())
    await task

asyncio.run(main())
"""


async def test_download_goes_on_after_the_kill_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    source = tmp_path / "source"
    source.mkdir()
    (source / NAME).write_bytes(os.urandom(500_000))
    (tmp_path / "models").mkdir()
    path = tmp_path / "jobs.sqlite"
    with running_hub() as hub:
        hub.publish("org/tiny", source)
        found = read_repository(HubClient(hub.endpoint, ""), "org/tiny")
        target = tmp_path / "models" / "tiny"
        job = DownloadJob(hub.endpoint, "org/tiny", found.commit, found.files, target)
        hub.faults.add(Fault("stall", file=NAME, at=200_000, times=1))
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CHILD, str(path)), cwd=ROOT, stdin=asyncio.subprocess.PIPE
        )
        assert child.stdin is not None
        child.stdin.write(job.to_json().encode())
        child.stdin.close()
        while arrived_bytes(job) < 200_000:
            await asyncio.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        await child.wait()
        store = JobStore(path)
        (left,) = store.jobs()
        assert (left.state, target.exists()) == ("running", False)
        runner = JobRunner(store, {"download": DownloadJobs(lambda: "")}, JobLimits)
        task = asyncio.create_task(runner.run())
        while not runner.jobs() or runner.jobs()[0].state != "done":
            await asyncio.sleep(0.02)
        assert (target / NAME).read_bytes() == (source / NAME).read_bytes()
        ranges = [each.headers.get("range") for each in hub.requests if "repos" in each.target]
        assert ranges == [None, "bytes=200000-"]
        # Had the end not been stored, the model would be found to be there.
        hub.forget_requests()
        await DownloadJobs(lambda: "").run(left, lambda _done, _total: None)
        assert hub.requests == []
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.close()


async def test_model_that_was_there_before_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    target.mkdir()
    file = RepositoryFile("m.gguf", 3, "0" * 40)
    job = DownloadJob("", "org/tiny", "c" * 40, (file,), target)
    (target / file.path).write_bytes(b"old")
    (target / "download.json").write_text(record_of(job, {}))

    async def refuse(_: Path) -> None:
        raise BrokenModel("broken")

    work = Job("1", "download", "tiny", job.to_json(), 0.0, 0.0)
    with pytest.raises(BrokenModel):
        await DownloadJobs(lambda: "", refuse).run(work, lambda _done, _total: None)
    assert (target / file.path).read_bytes() == b"old"
