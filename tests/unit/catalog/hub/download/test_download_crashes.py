"""Downloads whose process is killed at any byte and between any two steps (D6, D15)."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog.hub.client import HubClient
from catalog.hub.download import child, transfer
from catalog.hub.download.job import RECORD, DownloadJob, partial_file
from catalog.hub.download.run import partial_downloads
from catalog.hub.repository import read_repository
from catalog.jobs import Job
from deployments.jobs.downloads import DownloadJobs
from scripts.hub_lib.server import Hub

ROOT = Path(__file__).parents[5]
LARGE = "m-Q8_0.gguf"
SIZE = 3_000_000
ROUNDS = 50
STEPS = ("flushed", "renamed", "recorded", "cleaned", "published", "done")
Crash = Callable[..., int]


@pytest.fixture
def job(hub: Hub, client: HubClient, tmp_path: Path) -> DownloadJob:
    """A repository with a large file and one in a folder."""
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / LARGE).write_bytes(b"GGUF" + os.urandom(SIZE - 4))
    (source / "a" / "b" / "more.json").write_text("{}")
    hub.publish("org/tiny", source)
    found = read_repository(client, "org/tiny")
    target = tmp_path / "models" / "tiny"
    target.parent.mkdir()
    return DownloadJob(client.endpoint, "org/tiny", found.commit, found.files, target)


@contextmanager
def crashing() -> Iterator[Crash]:
    """Yield what downloads a job in a process that crashes where it is told."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.unit.catalog.hub.download.crashing_download"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def crash(job: DownloadJob, **where: Any) -> int:
            order = {"job": json.loads(job.to_json()), **where}
            process.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return int(process.stdout.readline())  # type: ignore[union-attr]

        yield crash
        process.stdin.close()


def is_whole(job: DownloadJob, path: Path) -> bool:
    """Whether a file has the size and the hash that the hub stated."""
    (file,) = (each for each in job.files if path.as_posix().endswith(each.path))
    content = path.read_bytes()
    if file.sha256:
        return hashlib.sha256(content).hexdigest() == file.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.git_oid


def visible(job: DownloadJob) -> list[Path]:
    """The files of a download under their own names, finished or not."""
    folders = [folder for folder in (job.work, job.target) if folder.exists()]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in found if ".partial" not in path.parts and path.name != RECORD]


def fetched(hub: Hub) -> list[str]:
    """The ranges that the file storage was asked for."""
    host = hub.cdn_origin.removeprefix("http://")
    return [each.headers.get("range", "bytes=0-") for each in hub.requests if each.host == host]


def test_download_survives_50_kills_d6(hub: Hub, job: DownloadJob) -> None:
    """Nothing half is visible, what had arrived is used, and the content is right."""
    chance = random.Random(6)
    codes: list[int] = []
    with crashing() as crash:
        while codes.count(-9) < ROUNDS:
            turn = replace(job, target=job.target.with_name(f"tiny-{len(codes)}"))
            hub.forget_requests()
            arrived = {0}
            while (code := crash(turn, after=chance.randrange(1, 200_000))) == -9:
                codes.append(code)
                assert not turn.target.exists()
                assert all(is_whole(turn, path) for path in visible(turn))
                if (part := partial_file(turn.work, LARGE)).exists():
                    arrived.add(part.stat().st_size)
            assert code == 0
            codes.append(code)
            assert all(is_whole(turn, path) for path in visible(turn))
            assert len(visible(turn)) == len(job.files)
            # Each run went on where the former had ended.
            begins = {int(each.removeprefix("bytes=")[:-1]) for each in fetched(hub)}
            assert begins == arrived - {SIZE}
            # Else the next one would be copied from it.
            shutil.rmtree(turn.target)


@pytest.mark.parametrize("step", STEPS)
async def test_download_is_recovered_from_a_crash_after_each_step_d15(
    hub: Hub, job: DownloadJob, step: str
) -> None:
    """Its job was stored as running: the next start makes it whole, and fetches nothing twice."""
    with crashing() as crash:
        # One file after the other, the large one first.
        assert crash(replace(job, connections=1), at=step) == -9
    assert job.target.exists() == (step in ("published", "done"))
    assert all(is_whole(job, path) for path in visible(job))
    hub.forget_requests()
    left = Job("1", "download", "tiny", job.to_json(), 0.0, 0.0, state="running")
    told: list[tuple[int, int]] = []
    await DownloadJobs(lambda: "").run(left, lambda done, total: told.append((done, total)))
    assert sorted(path.relative_to(job.target).as_posix() for path in visible(job)) == [
        "a/b/more.json", LARGE,
    ]  # fmt: skip
    assert all(is_whole(job, path) for path in visible(job))
    assert (job.target / RECORD).exists()
    assert told[-1] == (job.size_bytes, job.size_bytes)
    assert not job.work.exists()
    assert partial_downloads(job.target.parent) == ()
    assert fetched(hub) == []


def test_download_is_on_the_disk_before_it_is_visible_d15(
    job: DownloadJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss keeps the order: content, its name, the folders below, the model's name."""
    steps: list[str] = []

    def flushed_content(descriptor: int) -> None:
        steps.append(f"content of {os.fstat(descriptor).st_size} bytes")

    def flushed_folder(path: Path) -> None:
        steps.append(f"folder {path.relative_to(job.target.parent).as_posix()}")

    rename, replaced = Path.rename, Path.replace

    def renamed(path: Path, target: Path) -> Path:
        steps.append(f"model {target.name}")
        return rename(path, target)

    def named(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            steps.append(f"file {target.name}")
        return replaced(path, target)

    monkeypatch.setattr(transfer, "flush_to_disk", flushed_content)
    monkeypatch.setattr(child, "flush_path", flushed_folder)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", named)
    one = replace(job, connections=1)
    reporter: Any = child._Reporter(open(os.devnull, "w"))  # noqa: SIM115
    child.download(one, "", reporter, transfer.Pace())
    reporter.pipe.close()
    work = job.work.name
    assert steps == [
        f"content of {SIZE} bytes", f"file {LARGE}",
        "content of 2 bytes", "file more.json",
        f"folder {work}/a/b", f"folder {work}/a", f"folder {work}",
        "model tiny", "folder .",
    ]  # fmt: skip
