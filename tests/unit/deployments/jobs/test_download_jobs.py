"""Downloads as jobs: the kill -9 of the process that runs them, and what is there already."""

import asyncio
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from core.errors import BrokenModel, RequestError
from deployments.jobs import downloads as module
from deployments.jobs.downloads import DownloadJobs, is_there, prepare
from deployments.jobs.runner import JobRunner
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub, running_hub

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


def publish(hub: Hub, folder: Path) -> tuple[DownloadJob, bytes]:
    """Return the download of a repository with one file, and the file's content."""
    source = folder / "source"
    source.mkdir()
    content = os.urandom(500_000)
    (source / NAME).write_bytes(content)
    (folder / "models").mkdir()
    hub.publish("org/tiny", source)
    found = read_repository(HubClient(hub.endpoint, ""), "org/tiny")
    target = folder / "models" / "tiny"
    return DownloadJob(hub.endpoint, "org/tiny", found.commit, found.files, target), content


def ranges(hub: Hub) -> list[str | None]:
    """The ranges of the file that the hub was asked for."""
    return [each.headers.get("range") for each in hub.requests if "repos" in each.target]


async def test_model_that_lost_its_weights_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "_LARGE_BYTES", 100_000)
    with running_hub() as hub:
        wanted, content = publish(hub, tmp_path)
        job = Job("a1", "download", "Tiny", wanted.to_json(), 0.0, 0.0)
        downloads, target = DownloadJobs(lambda: ""), wanted.target
        await downloads.run(job, lambda _done, _total: None)
        (target / NAME).unlink()
        # What else is in the folder is the user's, as is a file of another size.
        for path in (target / "mine.txt", target / NAME):
            path.write_bytes(b"mine")
            with pytest.raises(RequestError, match="move it away"):
                prepare(wanted)
            assert path.read_bytes() == b"mine"
            path.unlink()
        prepare(wanted)
        assert not target.exists()
        await downloads.run(job, lambda _done, _total: None)
        assert (target / NAME).read_bytes() == content
        prepare(wanted)
        assert is_there(wanted)


async def test_download_goes_on_after_the_kill_of_everything_d6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    path = tmp_path / "jobs.sqlite"
    with running_hub() as hub:
        job, content = publish(hub, tmp_path)
        target = job.target
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
        assert (target / NAME).read_bytes() == content
        assert ranges(hub) == [None, "bytes=200000-"]
        # Had the end not been stored, the model would be found to be there.
        hub.forget_requests()
        await DownloadJobs(lambda: "").run(left, lambda _done, _total: None)
        assert hub.requests == []
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.close()


@pytest.mark.parametrize("is_same", [True, False])
async def test_the_token_is_sent_to_no_other_hub_than_the_one_it_is_for_d12(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    """A download goes on from the hub where it began, whatever HF_ENDPOINT is meanwhile."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        wanted, _ = publish(hub, tmp_path)
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT",
            f"{hub.endpoint}/" if is_same else "https://huggingface.co",
        )
        hub.forget_requests()
        job = Job("a", "download", "Tiny", wanted.to_json(), created=1.0, rank=1.0)
        await DownloadJobs(lambda: "hf_canary").run(job, lambda _done, _total: None)
        sent = {each.headers.get("authorization") for each in hub.requests}
    assert (wanted.target / NAME).exists()
    assert ("Bearer hf_canary" in sent) is is_same
    if not is_same:
        assert sent == {None}


@contextmanager
def small_disk() -> Iterator[None]:
    """Let files of this process and its children grow to 300 kB only.

    The system refuses further bytes as a full disk does, with EFBIG.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_download_onto_a_full_disk_waits_with_the_numbers_and_goes_on_d5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job is not tried again before it is due, and then goes on where it was."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    now = [1_800_000_000.0]
    with running_hub() as hub:
        job, content = publish(hub, tmp_path)
        store = JobStore(tmp_path / "jobs.sqlite")
        runner = JobRunner(
            store, {"download": DownloadJobs(lambda: "")}, JobLimits, clock=lambda: now[0]
        )
        task = asyncio.create_task(runner.run())
        queued = runner.add("download", "Tiny", job.to_json())
        with small_disk():
            while (waiting := runner.job(queued.id)).state in ("queued", "running"):
                await asyncio.sleep(0.02)
        assert (waiting.state, waiting.code) == ("waiting", "insufficient_disk")
        assert re.search(r"is full .*: a file of 488\.3 KiB was being written, .* are free",
                         waiting.reason)  # fmt: skip
        assert waiting.not_before == now[0] + 300
        assert arrived_bytes(job) == 300_000
        assert not job.target.exists()
        # However often the queue is looked at.
        hub.forget_requests()
        for _ in range(20):
            runner.look_again()
            await asyncio.sleep(0.01)
        assert (runner.job(queued.id), hub.requests) == (waiting, [])
        now[0] += 300
        runner.look_again()
        while (found := runner.job(queued.id)).state != "done":
            assert found.state in ("waiting", "running")
            await asyncio.sleep(0.02)
        assert (job.target / NAME).read_bytes() == content
        assert ranges(hub) == ["bytes=300000-"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.close()


def work_of(target: Path) -> Job:
    file = RepositoryFile("m.gguf", 3, "0" * 40)
    wanted = DownloadJob("", "org/tiny", "c" * 40, (file,), target)
    return Job(target.name, "download", "tiny", wanted.to_json(), 0.0, 0.0)


async def test_downloads_that_run_share_the_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = DownloadJobs(lambda: "")
    told: list[int] = []
    others: list[list[str]] = []

    async def note(
        job: DownloadJob, *_: object, limit: Callable[[], int], beside: Sequence[DownloadJob]
    ) -> None:
        told.extend((job.limit_bytes_per_s, limit()))
        others.append([each.target.name for each in beside])
        if len(told) == 2:
            await downloads.run(work_of(tmp_path / "b"), lambda _done, _total: None)
            told.append(limit())

    monkeypatch.setattr(module, "run_download", note)
    downloads.limit_bytes_per_s = 9
    await downloads.run(work_of(tmp_path / "a"), lambda _done, _total: None)
    # Alone, beside another one, and alone again.
    assert told == [9, 9, 4, 4, 9]
    assert others == [[], ["a"]]
    downloads.limit_bytes_per_s = 0
    assert downloads.share_bytes_per_s() == 0


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
