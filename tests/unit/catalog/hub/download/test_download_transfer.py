"""One file against a hub that fails in every way (D1 to D4, D13)."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from catalog.hub.client import HubClient
from catalog.hub.download import transfer as module
from catalog.hub.repository import read_repository
from core.errors import (
    ChecksumFailed,
    HubNotFound,
    HubRateLimited,
    HubUnavailable,
    InsufficientDisk,
    RequestError,
    Unavailable,
)
from scripts.hub_lib.faults import Fault
from tests.unit.catalog.hub.conftest import LIMITS
from tests.unit.catalog.hub.download.conftest import LARGE, SIZE, Download


def test_download_is_whole_and_leaves_nothing_else(download: Download) -> None:
    assert download.fetch().read_bytes() == download.content
    assert download.fetch("config.json").read_text() == "{}"
    assert download.leftovers == ["config.json", LARGE]
    assert sum(download.grown) == SIZE + 2
    # What is there is not fetched again.
    download.hub.forget_requests()
    download.fetch()
    assert download.hub.requests == []


@pytest.mark.parametrize(
    ("kind", "percent"),
    [*(("truncate", each) for each in range(0, 100, 10)), ("stall", 0), ("stall", 60)],
)
def test_download_that_breaks_goes_on_where_it_was_d1(
    download: Download, kind: str, percent: int
) -> None:
    """D1: cut at every 10 %, at most what was under way is fetched twice."""
    at = SIZE * percent // 100
    download.hub.faults.add(Fault(kind, file=LARGE, at=at, times=1))
    if kind == "stall":
        download.hasten()
    assert download.fetch().read_bytes() == download.content
    assert download.ranges == [None, f"bytes={at}-" if at else None]
    assert sum(download.grown) == SIZE
    (wait,) = download.waits
    assert wait[0] == 1.0


def test_download_that_is_slow_but_goes_on_is_left_alone_d4(download: Download) -> None:
    """D4: a second is longer than the pause between its pieces, and shorter than the whole."""
    client = HubClient(download.job.endpoint, "", replace(LIMITS, silence_s=1.0, total_s=1.0))
    download.transfer.client = client
    download.hub.faults.add(Fault("slow", file=LARGE, value="400000"))
    assert download.fetch().read_bytes() == download.content
    assert (download.waits, download.ranges) == ([], [None])


def test_download_of_another_process_goes_on_with_its_validator(download: Download) -> None:
    part = download.part
    part.write_bytes(download.content[:400_000])
    etag = f'"{download.file().sha256}"'
    part.with_name(f"{part.name}.etag").write_text(etag)
    download.fetch()
    assert download.ranges == ["bytes=400000-"]
    assert download.hub.requests[-1].headers["if-range"] == etag
    assert download.grown[0] == 400_000


@pytest.mark.parametrize(
    ("fault", "ranges"),
    [
        (Fault("ignore-range", file=LARGE), ["bytes=400000-"]),
        (Fault("wrong-range", file=LARGE, times=1), ["bytes=400000-", None]),
        (Fault("etag", file=LARGE), ["bytes=400000-"]),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_download_is_never_put_together_from_different_answers_d2(
    download: Download, fault: Fault, ranges: list[str | None]
) -> None:
    """D2: an ignored range, another range, another validator: from the start, whole."""
    part = download.part
    part.write_bytes(b"x" * 400_000)
    part.with_name(f"{part.name}.etag").write_text(f'"{download.file().sha256}"')
    download.hub.faults.add(fault)
    assert download.fetch().read_bytes() == download.content
    assert download.ranges == ranges
    assert sum(download.grown) == SIZE


def test_download_of_a_damaged_part_is_noticed_and_made_again(download: Download) -> None:
    part = download.part
    part.write_bytes(b"x" * 400_000)
    part.with_name(f"{part.name}.etag").write_text(f'"{download.file().sha256}"')
    assert download.fetch().read_bytes() == download.content
    assert download.ranges == ["bytes=400000-", None]


def test_download_longer_than_its_file_begins_anew(download: Download) -> None:
    part = download.part
    part.write_bytes(b"x" * (SIZE + 1))
    assert download.fetch().read_bytes() == download.content
    assert download.ranges == [None]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("corrupt", file=LARGE, at=500_000), "its SHA-256 is"),
        (Fault("html", file=LARGE), "bytes arrived"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_download_with_another_content_leaves_nothing_d3(
    download: Download, fault: Fault, said: str
) -> None:
    """D3: one more try, then an error; nothing under the final name, no partial file."""
    download.hub.faults.add(fault)
    with pytest.raises(ChecksumFailed, match=said):
        download.fetch()
    assert len(download.ranges) == 2
    assert download.leftovers == []
    assert sum(download.grown) == 0
    download.hub.faults.clear()
    assert download.fetch().read_bytes() == download.content


def test_download_that_is_damaged_once_succeeds(download: Download) -> None:
    download.hub.faults.add(Fault("corrupt", file=LARGE, at=500_000, times=1))
    assert download.fetch().read_bytes() == download.content


@pytest.mark.parametrize("kind", ["size", "hash"])
def test_download_from_a_hub_that_lies_is_refused_d3(download: Download, kind: str) -> None:
    download.hub.faults.add(Fault(kind, file="api", value="3"))
    lying = read_repository(HubClient(download.job.endpoint, ""), "org/tiny")
    file = next(each for each in lying.files if each.path == LARGE)
    with pytest.raises(ChecksumFailed):
        download.transfer.fetch(file)
    assert download.leftovers == []


def test_download_of_a_small_file_is_checked_by_its_git_hash(download: Download) -> None:
    download.hub.faults.add(Fault("corrupt", file="config.json", at=0))
    with pytest.raises(ChecksumFailed, match="its git hash is"):
        download.fetch("config.json")
    assert download.leftovers == []


def test_download_waits_longer_each_time_and_then_gives_up(download: Download) -> None:
    download.hub.faults.add(Fault("drop", file=LARGE))
    with pytest.raises(HubUnavailable, match="broke off"):
        download.fetch()
    assert [seconds for seconds, _ in download.waits] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]


def test_download_that_brings_something_never_gives_up(download: Download) -> None:
    for at in range(1, 20):
        download.hub.faults.add(Fault("truncate", file=LARGE, at=1000, times=1))
        del at
    assert download.fetch().read_bytes() == download.content
    assert [seconds for seconds, _ in download.waits] == [1.0] * 19


def test_download_over_the_rate_limit_waits_as_long_as_it_is_told_d11(download: Download) -> None:
    download.hub.faults.add(Fault("status", file=LARGE, value="429", seconds=17, times=2))
    assert download.fetch().read_bytes() == download.content
    assert [seconds for seconds, _ in download.waits] == [17.0, 17.0]
    download.hub.faults.add(Fault("status", file="config.json", value="429", seconds=5))
    with pytest.raises(HubRateLimited) as problem:
        download.fetch("config.json")
    assert problem.value.retry_after_s == 5


def test_download_of_what_is_gone_is_not_tried_again(download: Download) -> None:
    download.hub.faults.add(Fault("status", file=LARGE, value="404"))
    with pytest.raises(HubNotFound):
        download.fetch()
    assert download.waits == []


def test_download_stays_at_its_commit_d13(download: Download) -> None:
    """D13: the repository moves while it is downloaded."""
    download.fetch("config.json")
    other = download.source.parent / "other"
    other.mkdir()
    (other / LARGE).write_bytes(b"GGUF other")
    download.hub.publish("org/tiny", other)
    assert download.fetch().read_bytes() == download.content
    commits = {each.target.split("/resolve/")[1][:40] for each in download.hub.requests
               if "/resolve/" in each.target}  # fmt: skip
    assert commits == {download.job.commit}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, InsufficientDisk),
        (errno.EDQUOT, InsufficientDisk),
        (errno.EACCES, Unavailable),
        (errno.EIO, Unavailable),
    ],
)
def test_download_that_cannot_be_written_keeps_what_arrived_d5(
    download: Download, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    """D5: no retry; the next run goes on."""
    download.hub.faults.add(Fault("truncate", file=LARGE, at=300_000, times=1))

    def full(*_: object) -> None:
        raise OSError(code, "as injected")

    monkeypatch.setattr(download.transfer.pace, "sleep", full)
    with pytest.raises(kind) as problem:
        download.fetch()
    assert type(problem.value) is kind
    assert download.part.stat().st_size == 300_000
    monkeypatch.setattr(download.transfer.pace, "sleep", lambda _: None)
    assert download.fetch().read_bytes() == download.content
    assert download.ranges[-1] == "bytes=300000-"


def test_download_to_a_link_does_not_follow_it(download: Download, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep")
    download.part.symlink_to(victim)
    with pytest.raises(Unavailable):
        download.fetch()
    assert victim.read_text() == "keep"
    assert module.HEADROOM_BYTES > 0


@pytest.mark.parametrize("name", ["x" * 300 + ".json", "config.json/tokenizer.json"])
def test_download_of_a_name_that_the_disk_cannot_have_is_given_up(
    download: Download, name: str
) -> None:
    """Waiting for the disk would never end."""
    download.fetch("config.json")
    with pytest.raises(RequestError, match="cannot be stored here"):
        download.transfer.fetch(replace(download.file("config.json"), path=name))
