"""Where a model came from is recorded, and what two models share is fetched once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog.hub.download.job import RECORD, DownloadJob, partial_file
from catalog.hub.download.record import read_record, record_of, shared_files
from catalog.hub.download.run import run_download
from tests.unit.catalog.hub.download.conftest import LARGE, Download


def ignore(_: object) -> None:
    """Take no notice."""


async def test_download_of_what_a_model_of_another_owner_has_is_copied(download: Download) -> None:
    library = download.job.target.parent
    owned = replace(download.job, library=str(library))
    first = replace(owned, target=library / "one" / "tiny")
    second = replace(owned, target=library / "two" / "tiny")
    for job in (first, second):
        job.target.parent.mkdir()
    await run_download(first, "", ignore)
    assert shared_files(replace(second, library="")) == {}
    assert shared_files(second) == {download.file().sha256: first.target / LARGE}
    download.hub.forget_requests()
    await run_download(second, "", ignore)
    assert (second.target / LARGE).read_bytes() == download.content
    assert download.ranges == []


def other(download: Download) -> DownloadJob:
    """Return the job of another model with the same large file."""
    return replace(download.job, target=download.job.target.with_name("other"))


async def test_download_is_recorded_with_its_hashes(download: Download) -> None:
    await run_download(download.job, "", ignore)
    record = read_record(download.job.target)
    assert record is not None
    assert (record.endpoint, record.repository) == (download.job.endpoint, "org/tiny")
    assert record.commit == download.job.commit
    assert record.hashes == {
        LARGE: download.file().sha256,
        "config.json": download.file("config.json").git_oid,
    }


def test_record_has_no_secrets_of_addresses(download: Download) -> None:
    """D12: the folder of a model may be copied, and its record is readable for all users."""
    url = "https://example.com/m.gguf?token=hush#x"
    job = replace(download.job, endpoint="https://me:hush@hub.test/hf", url=url)
    text = record_of(job, {})
    assert "hush" not in text
    assert json.loads(text)["endpoint"] == "https://hub.test/hf"
    assert json.loads(text)["url"] == "https://example.com/m.gguf"


async def test_download_of_what_another_model_has_is_copied_d7(download: Download) -> None:
    await run_download(download.job, "", ignore)
    download.hub.forget_requests()
    await run_download(other(download), "", ignore)
    assert (other(download).target / LARGE).read_bytes() == download.content
    assert download.ranges == []
    # A copy of its own: deleting one model leaves the other whole.
    assert (other(download).target / LARGE).stat().st_nlink == 1


async def test_download_copies_nothing_that_was_changed(download: Download) -> None:
    await run_download(download.job, "", ignore)
    file = download.job.target / LARGE
    file.write_bytes(b"x" * file.stat().st_size)
    download.hub.forget_requests()
    await run_download(other(download), "", ignore)
    assert (other(download).target / LARGE).read_bytes() == download.content
    assert download.ranges == [None]


async def test_p6_download_fetches_what_is_deleted_while_it_is_copied(download: Download) -> None:
    """The model that has the file as well is deleted once its files are listed."""
    await run_download(download.job, "", ignore)
    download.hub.forget_requests()
    copied = replace(download.transfer, work=other(download).work)
    copied.shared = shared_files(other(download))
    shutil.rmtree(download.job.target)
    copied.fetch(download.file())
    assert (copied.work / LARGE).read_bytes() == download.content
    assert download.ranges == [None]


async def test_download_goes_on_from_a_part_with_a_local_file(download: Download) -> None:
    await run_download(download.job, "", ignore)
    download.hub.forget_requests()
    copied = replace(download.transfer, work=other(download).work)
    copied.shared = shared_files(other(download))
    part = partial_file(copied.work, LARGE)
    part.parent.mkdir(parents=True)
    part.write_bytes(download.content[:400_000])
    assert list(copied.shared) == [download.file().sha256]
    copied.fetch(download.file())
    assert download.ranges == []
    assert (copied.work / LARGE).read_bytes() == download.content
    assert copied.hashes == {LARGE: download.file().sha256}


def test_download_finds_shared_files_beside_its_target_only(download: Download) -> None:
    folder = download.job.target.parent / "there"
    folder.mkdir()
    assert shared_files(download.job) == {}
    text = record_of(download.job, {LARGE: download.file().sha256})
    (folder / RECORD).write_text(text)
    assert shared_files(download.job) == {}
    (folder / LARGE).symlink_to(download.source / LARGE)
    assert shared_files(download.job) == {}
    (folder / LARGE).unlink()
    (folder / LARGE).write_bytes(download.content[:-1])
    assert shared_files(download.job) == {}
    (folder / LARGE).write_bytes(download.content)
    assert shared_files(download.job) == {download.file().sha256: folder / LARGE}
    secret = {"path": "../../secret", "size": 1, "hash": download.file().sha256}
    (folder / RECORD).write_text(json.dumps({**json.loads(text), "files": [secret]}))
    assert shared_files(download.job) == {}


@pytest.mark.parametrize(
    "value", [None, [], {}, {"version": 2, "files": []}, {"version": 1, "files": 3}, "text"]
)
def test_download_record_that_is_none_is_not_read(tmp_path: Path, value: Any) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / RECORD).write_text(json.dumps(value))
    assert read_record(tmp_path) is None


def test_download_record_with_odd_files_has_the_others(tmp_path: Path) -> None:
    files = [None, {"path": 3}, {"path": "a", "size": True, "hash": ""}, {"path": "b", "size": 1}]
    good = {"path": "c", "size": 5, "hash": "d"}
    (tmp_path / RECORD).write_text(json.dumps({"version": 1, "files": [*files, good], "url": 5}))
    record = read_record(tmp_path)
    assert record is not None
    assert (record.hashes, record.sizes, record.url) == ({"c": "d"}, {"c": 5}, "")
