"""Whole downloads in their process: progress, pause, kill -9, preflight, secrets (D5, D6, D12)."""

import asyncio
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from catalog.hub.client import HubClient
from catalog.hub.download.job import RECORD, DownloadJob, partial_file
from catalog.hub.download.run import (
    DownloadProgress,
    PartialDownload,
    arrived_bytes,
    discard,
    discard_partial,
    partial_downloads,
    require_space,
    run_download,
)
from catalog.hub.entries import RepositoryFile
from catalog.hub.repository import read_repository
from catalog.store import CatalogStore
from core.errors import (
    ChecksumFailed,
    HubAccessDenied,
    HubOffline,
    ImpetusError,
    InsufficientDisk,
    RequestError,
    Unavailable,
)
from core.units import GIB
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub
from tests.unit.catalog.hub.conftest import LIMITS
from tests.unit.catalog.hub.download.conftest import LARGE, SIZE, Download
from tests.unit.catalog.scan.folders import Shelf, write_model

SECRET = "hf_never_shown"


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def ignore(_: DownloadProgress) -> None:
    """Take no notice."""


def children() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [each for each in found if "catalog.hub.download.child" in each.cmdline()]


def download_of(download: Download) -> DownloadJob:
    """Return the download of what the hub has now."""
    found = read_repository(HubClient(download.job.endpoint, "", LIMITS), "org/tiny")
    return replace(download.job, commit=found.commit, files=found.files)


async def until_arrived(job: DownloadJob, count: int) -> None:
    """Wait until so many bytes are there; the test's time limit ends a wait for ever."""
    while arrived_bytes(job) < count:
        await asyncio.sleep(0.02)


async def test_download_makes_the_folder_and_tells_its_progress(download: Download) -> None:
    told: list[DownloadProgress] = []
    path = await run_download(download.job, "", told.append)
    assert path == download.job.target
    assert (path / LARGE).read_bytes() == download.content
    assert sorted(each.name for each in path.iterdir()) == ["config.json", RECORD, LARGE]
    assert not download.job.work.exists()
    assert (told[-1].done_bytes, told[-1].total_bytes) == (SIZE + 2, SIZE + 2)
    assert told[-1].remaining_s in (0.0, None)
    with pytest.raises(RequestError, match="exists already"):
        await run_download(download.job, "", ignore)


async def test_download_that_is_paused_goes_on(download: Download) -> None:
    download.hub.faults.add(Fault("stall", file=LARGE, at=600_000, times=1))
    task = asyncio.create_task(run_download(download.job, "", ignore))
    await until_arrived(download.job, 600_000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == []
    assert not download.job.target.exists()
    await run_download(download.job, "", ignore)
    assert (download.job.target / LARGE).read_bytes() == download.content
    assert download.ranges == [None, "bytes=600000-"]


async def test_download_of_another_commit_keeps_no_file_of_the_first(download: Download) -> None:
    """D13: weights that are uploaded again often have the size that they had."""
    (download.source / "tokenizer.json").write_text("[1]")
    (download.source / "merges.txt").write_text("a b")
    (download.source / "same.json").write_text("[]")
    download.hub.publish("org/tiny", download.source)
    first = download_of(download)
    download.hub.faults.add(Fault("status", file=LARGE, value="403"))
    with pytest.raises(HubAccessDenied):
        await run_download(replace(first, connections=1), "", ignore)
    # The small files come after the large one; they are whole, as after a failure at the end.
    for name in ("tokenizer.json", "merges.txt", "same.json", "config.json"):
        shutil.copyfile(download.source / name, first.work / name)
    download.hub.faults.clear()
    (download.source / "tokenizer.json").write_text("[2]")
    (download.source / "merges.txt").unlink()
    download.hub.publish("org/tiny", download.source)
    second = download_of(download)
    assert (second.work, second.commit != first.commit) == (first.work, True)
    download.hub.forget_requests()
    await run_download(second, "", ignore)
    assert (second.target / "tokenizer.json").read_text() == "[2]"
    assert sorted(path.name for path in second.target.iterdir()) == sorted(
        ["config.json", RECORD, LARGE, "same.json", "tokenizer.json"]
    )
    assert not any("same.json" in each.target for each in download.hub.requests)


@pytest.mark.parametrize("is_running", [True, False])
async def test_download_that_is_cancelled_takes_nothing_from_another_one(
    download: Download, is_running: bool
) -> None:
    """Such as one that failed at an earlier commit, which a user clears away."""
    failed = replace(download.job, commit="1" * 40)
    download.hub.faults.add(Fault("stall", file=LARGE, at=600_000, times=1))
    task = asyncio.create_task(run_download(download.job, "", ignore))
    await until_arrived(download.job, 600_000)
    if is_running:
        # Also the same one, if it was asked for twice.
        discard(download.job)
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    discard(failed)
    assert arrived_bytes(download.job) >= 600_000
    if is_running:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await run_download(download.job, "", ignore)
    assert download.ranges == [None, "bytes=600000-"]
    assert (download.job.target / LARGE).read_bytes() == download.content


async def test_download_that_goes_on_tells_the_speed_of_the_network(download: Download) -> None:
    """Of several files parts are found one after the other, while others arrive."""
    whole = download.source / "n-Q8_0.gguf"
    whole.write_bytes(b"GGUF" + bytes(2 * SIZE))
    download.hub.publish("org/tiny", download.source)
    job = replace(download_of(download), connections=1)
    (job.work / whole.name).write_bytes(whole.read_bytes())
    download.part.write_bytes(download.content[:900_000])
    download.hub.faults.add(Fault("slow", file=LARGE, value="50000"))
    told: list[DownloadProgress] = []
    await run_download(job, "", told.append, tick_s=0.1)
    assert (job.target / LARGE).read_bytes() == download.content
    # 100,000 bytes were left, which take two seconds.
    assert 0 < max(each.speed for each in told) < 200_000


async def test_download_takes_another_limit_without_another_connection(download: Download) -> None:
    limits = [50_000]
    job = replace(download.job, limit_bytes_per_s=50_000)
    began = time.monotonic()
    task = asyncio.create_task(run_download(job, "", ignore, limit=lambda: limits[0], tick_s=0.05))
    await until_arrived(job, 100_000)
    limits[0] = 0
    await task
    # 1,000,000 bytes would have taken 20 s.
    assert time.monotonic() - began < 15
    assert download.ranges == [None]
    assert (job.target / LARGE).read_bytes() == download.content


async def test_download_survives_kills(download: Download) -> None:
    """D6: whenever its process is killed, nothing half is visible and the next one goes on."""
    for at in (100_000, 400_000, 999_999):
        had = max(arrived_bytes(download.job) - 2, 0)
        download.hub.faults.add(Fault("stall", file=LARGE, at=at - had, times=1))
        task = asyncio.create_task(run_download(download.job, "", ignore))
        await until_arrived(download.job, at + 2)
        (child,) = children()
        child.send_signal(signal.SIGKILL)
        with pytest.raises(ImpetusError, match="what has arrived is kept"):
            await task
        assert not download.job.target.exists()
    await run_download(download.job, "", ignore)
    assert (download.job.target / LARGE).read_bytes() == download.content
    assert download.ranges[1:] == ["bytes=100000-", "bytes=400000-", "bytes=999999-"]


async def test_download_that_stalls_says_so_and_tries_again_d4(download: Download) -> None:
    """D4: the speed falls to 0, the reason is told, and the transfer goes on."""
    told: list[DownloadProgress] = []
    download.hub.faults.add(Fault("stall", file=LARGE, at=500_000, times=1))
    job = replace(download.job, silence_s=1.0)
    await run_download(job, "", told.append, tick_s=0.1)
    stalled = [each for each in told if each.done_bytes >= 500_000 and each.stalled_s > 0.5]
    assert stalled
    assert {each.reason for each in told} > {""}
    assert any("did not answer in time" in each.reason for each in told)


async def test_download_keeps_its_token_to_itself_d12(
    download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D12: it is in no argument, no environment and no file."""
    download.hub.add_user("me", SECRET)
    download.hub.faults.add(Fault("stall", file=LARGE, at=1000, times=1))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    try:
        task = asyncio.create_task(run_download(download.job, SECRET, ignore))
        await until_arrived(download.job, 1000)
        (child,) = children()
        assert SECRET not in " ".join(child.cmdline())
        assert SECRET not in str(child.environ())
        assert SECRET not in download.job.to_json()
    finally:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for path in download.job.work.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()
    sent = {each.host: each.headers.get("authorization") for each in download.hub.requests}
    assert sent == {
        download.hub.endpoint.removeprefix("http://"): f"Bearer {SECRET}",
        download.hub.cdn_origin.removeprefix("http://"): None,
    }


async def test_download_reports_the_errors_of_its_process(
    download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    download.hub.faults.add(Fault("corrupt", file=LARGE, at=5))
    with pytest.raises(ChecksumFailed, match="was removed"):
        await run_download(download.job, "", ignore)
    download.hub.faults.clear()
    download.hub.publish("org/tiny", download.source, gated="manual")
    with pytest.raises(HubAccessDenied, match="is gated"):
        await run_download(download.job, "", ignore)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubOffline):
        await run_download(download.job, "", ignore)
    assert not download.job.target.exists()
    discard(download.job)
    assert not download.job.work.exists()


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
async def test_download_asks_nobody_in_offline_mode(
    download: Download, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for each in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    with pytest.raises(HubOffline, match=name):
        await run_download(download.job, "", ignore)
    assert list(download.hub.requests) == []


async def test_download_fetches_several_files_at_the_same_time(download: Download) -> None:
    download.hub.faults.add(Fault("stall", file=LARGE, at=1000, times=1))
    task = asyncio.create_task(run_download(download.job, "", ignore))
    # The largest is first, and does not hold the others up.
    while not (download.job.work / "config.json").exists():
        await asyncio.sleep(0.02)
    assert download.part.exists()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_download_that_nobody_goes_on_with_is_listed_and_removed_d14(
    download: Download,
) -> None:
    """D14: with its size; one that runs is left alone, however old its files are."""
    folder = download.job.target.parent
    download.hub.faults.add(Fault("stall", file=LARGE, at=1000, times=1))
    task = asyncio.create_task(run_download(download.job, "", ignore))
    await until_arrived(download.job, 1000)
    assert partial_downloads(folder) == ()
    assert not discard_partial(PartialDownload(download.job.work, 0, 0.0))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (left,) = partial_downloads(folder)
    assert left.work == download.job.work
    assert 1000 <= left.size_bytes < 2000
    (folder / ".link.download").symlink_to(download.source)
    assert partial_downloads(folder) == (left,)
    assert discard_partial(left)
    assert not download.job.work.exists()
    assert not discard_partial(left)
    assert (download.source / LARGE).exists()


async def test_download_of_the_same_folder_runs_once(download: Download) -> None:
    download.hub.faults.add(Fault("stall", file=LARGE, at=1000, times=1))
    task = asyncio.create_task(run_download(download.job, "", ignore))
    await until_arrived(download.job, 1000)
    with pytest.raises(Unavailable, match="already"):
        await run_download(download.job, "", ignore)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_download_without_room_says_the_numbers_before_a_byte_d5(
    download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: what has arrived already counts as room that is taken."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GIB, GIB, 100_000))
    with pytest.raises(InsufficientDisk, match=r"needs 976\.6 KiB .* 97\.7 KiB are free"):
        await run_download(download.job, "", ignore)
    assert download.hub.requests == []
    large = replace(download.file(), size_bytes=3 * GIB)
    job = replace(download.job, files=(large,), target=download.job.target.parent / "a" / "b")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 3 * GIB))
    with pytest.raises(InsufficientDisk, match=r"Free 512\.0 MiB"):
        require_space(job)
    part = partial_file(job.work, LARGE)
    part.parent.mkdir(parents=True)
    with part.open("wb") as stream:
        stream.truncate(GIB)
    require_space(job)
    # What runs beside it has a gigabyte to go.
    running = replace(
        job, target=job.target.with_name("c"), files=(replace(large, size_bytes=GIB),)
    )
    with pytest.raises(
        InsufficientDisk, match=r"1\.00? GiB for downloads that run .*Free 512\.0 MiB"
    ):
        require_space(job, (running,))


@pytest.mark.parametrize(
    "names",
    [
        *(["../x.json"], ["/x.json"], ["a/../../x"], [".partial/x.json"], [".PARTIAL/lock"], [""]),
        *(["a.json", "A.json"], ["n\u00e4.json", "na\u0308.json"], ["a/b.json", "A/B.json"]),
    ],
)
async def test_download_of_names_that_clash_or_leave_the_folder_is_refused_d10(
    download: Download, names: list[str]
) -> None:
    """D10, M12: also for systems on which two of the names are the same."""
    files = tuple(RepositoryFile(name, 2, "0" * 40) for name in names)
    with pytest.raises(RequestError):
        await run_download(replace(download.job, files=files), "", ignore)
    assert download.hub.requests == []


def test_download_job_survives_its_json(download: Download) -> None:
    assert DownloadJob.from_json(download.job.to_json()) == download.job
    assert sys.getsizeof(download.job.to_json()) < 5000
    assert Path(download.job.work).name == ".tiny.download"


async def test_download_is_scanned_once_it_is_whole(tmp_path: Path, hub: Hub) -> None:
    """What is still arriving is not inspected; the model that arrived is in the catalog."""
    source = write_model(tmp_path / "source")
    hub.publish("org/Nice-Model", source)
    client = HubClient(hub.endpoint, "", LIMITS)
    repository = read_repository(client, "org/Nice-Model")
    (entry,) = repository.entries
    models = tmp_path / "models"
    job = DownloadJob(
        hub.endpoint, "org/Nice-Model", repository.commit, entry.files, models / "Nice-Model"
    )
    hub.faults.add(Fault("stall", file="model.safetensors", at=1000, times=1))
    shelf = Shelf(tmp_path, CatalogStore(tmp_path / "catalog.sqlite"))
    models.mkdir()
    task = asyncio.create_task(run_download(job, "", ignore))
    await until_arrived(job, 1000)
    shelf.scan()
    assert (shelf.states(), shelf.looked) == ({}, [])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await run_download(job, "", ignore)
    shelf.scan()
    assert shelf.states() == {"nice-model@safetensors-f32": "ok"}
    shelf.store.close()
