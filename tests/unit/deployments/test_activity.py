"""What a process was computing is known after it was killed, and whom that charges."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments import activity
from deployments.activity import (
    FILE_BYTES,
    ActivityFile,
    DeathCause,
    DeathRecords,
    Doing,
    Work,
    activity_path,
    cause_of,
    read_activity,
    request_key,
    sweep,
)

ROOT = Path(__file__).resolve().parents[3]

CHILD = """
import sys, time
from pathlib import Path
from deployments.activity import ActivityFile

record = ActivityFile(Path(sys.argv[1]))
one, two = record.open_model("one"), record.open_model("two")
with one.serving("a", is_suspect=False), one.serving("b", is_suspect=False):
    with two.serving("c", is_suspect=True), two.working("c"), one.step:
        one.begin_prefill("a")
        one.begin_prefill("b")
        one.end_prefill("b")
        print("busy", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "activity-r"


@pytest.fixture
def record(path: Path) -> Iterator[ActivityFile]:
    record = ActivityFile(path)
    yield record
    record.close()


def left_behind(path: Path) -> tuple[Work, ...]:
    """Return what a reader would find if this process died now."""
    assert read_activity(path) is None
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    works = read_activity(copy)
    assert works is not None
    return works


@pytest.fixture
def killed(path: Path) -> Path:
    """The record of a process that was killed amid its work."""
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        assert read_activity(path) is None
        os.kill(process.pid, signal.SIGKILL)
    return path


def test_a_killed_process_leaves_what_it_was_computing(killed: Path) -> None:
    works = read_activity(killed)
    assert works is not None
    computed = {(work.model_id, work.doing, work.request) for work in works if work.is_computed}
    assert computed == {
        ("two", Doing.WORKING, request_key("c")),
        ("one", Doing.PREFILL, request_key("a")),
    }
    assert {work.request for work in works if work.is_suspect} == {request_key("c")}
    assert len(works) == 5


def test_entries_end_with_their_work(record: ActivityFile, path: Path) -> None:
    model = record.open_model("m")
    with model.loading():
        assert [work.doing for work in left_behind(path)] == [Doing.LOADING]
    with model.serving("a", is_suspect=False):
        with model.working("a", "b"):
            assert len(left_behind(path)) == 3
        model.begin_prefill("a")
        model.begin_prefill("a")
        assert [work.is_computed for work in left_behind(path)] == [False, False]
        with model.step:
            assert cause_of(left_behind(path)).names("a")
    # The end of a request ends what its engine left open, whatever happened there.
    model.end_prefill("a")
    assert left_behind(path) == ()
    with pytest.raises(ValueError, match="bad"), model.step, model.working("a"):
        raise ValueError("bad")
    assert left_behind(path) == ()


def test_places_are_used_again_and_running_out_of_them_is_harmless(
    record: ActivityFile, path: Path
) -> None:
    for number in range(1000):
        model = record.open_model(f"model-{number}")
        with model.working("r"):
            assert [work.model_id for work in left_behind(path)] == [f"model-{number}"]
        model.close()
        if number > 200:
            break
    many = [record.open_model(str(number)) for number in range(200)]
    with many[-1].step, many[-1].serving("r", is_suspect=True), many[-1].loading():
        assert left_behind(path) == ()
    names = [str(number) for number in range(10_000)]
    with many[0].working(*names):
        assert len(left_behind(path)) == 8192
    assert left_behind(path) == ()


def test_a_long_name_and_any_text_fit(record: ActivityFile, path: Path) -> None:
    with record.open_model("ä" * 600).working("\N{SNOWMAN}" * 1000):
        (work,) = left_behind(path)
    assert set(work.model_id) <= {"ä", "\N{REPLACEMENT CHARACTER}"}


def test_a_record_that_is_closed_is_gone(record: ActivityFile, path: Path) -> None:
    assert path.stat().st_size == FILE_BYTES
    record.close()
    record.close()
    assert not path.exists()
    with record.open_model("m").working("r"):
        assert read_activity(path) is None


@pytest.mark.parametrize("content", [b"", b"x" * FILE_BYTES, b"IMPACT01", None])
def test_a_file_that_is_no_record_tells_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "activity-x"
    if content is not None:
        path.write_bytes(content)
    assert read_activity(path) is None


def test_any_bytes_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "activity-x"
    for seed in (1, 255):
        path.write_bytes(b"IMPACT01" + bytes([seed]) * (FILE_BYTES - 8))
        assert read_activity(path) is not None


def test_a_folder_that_cannot_be_written_costs_the_record_only(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    record = ActivityFile(tmp_path / "run" / "activity-r")
    with record.open_model("m").working("r"):
        pass
    record.close()


def test_old_records_are_removed_some_time_after_their_process(killed: Path) -> None:
    folder = killed.parent
    # A process that ran for long leaves a file that looks old; another one starts.
    os.utime(killed, (1, 1))
    alive = ActivityFile(folder / "activity-alive")
    os.utime(folder / "activity-alive", (1, 1))
    assert read_activity(killed)
    sweep(folder)
    assert killed.exists()
    os.utime(killed, (1, 1))
    sweep(folder)
    assert sorted(folder.iterdir()) == [folder / "activity-alive"]
    alive.close()


async def test_readers_get_the_cause_from_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "_SHARED_MEMORY", tmp_path / "nowhere")
    await check_cause(tmp_path, monkeypatch)
    assert (tmp_path / "run").is_dir()


async def test_readers_get_the_cause_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "_SHARED_MEMORY", tmp_path)
    await check_cause(tmp_path, monkeypatch)
    assert not (tmp_path / "run").exists()
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    # A folder that others can write to is not used.
    folder.chmod(0o777)
    assert activity_path(tmp_path, "r").parent == tmp_path / "run"


async def check_cause(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, records = activity_path(home, "r"), DeathRecords(home)
    assert await records.cause("r") is None
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        assert await records.cause("r") is None
        monkeypatch.setattr(activity, "_DYING_S", 30.0)
        asking = asyncio.ensure_future(records.cause("r"))
        await asyncio.sleep(0)
        process.kill()
        others = await asyncio.gather(*(records.cause("r") for _ in range(5)))
        cause = await asking
        assert others == [cause] * 5
        assert records._reading == {}
    assert cause == await records.cause("r")
    assert cause is not None
    assert cause.models == {"two"}
    assert cause.names("c")
    assert not cause.names("a")
    path.unlink()
    # What was read once stays known.
    assert await records.cause("r") == cause


A, B, C = (request_key(name) for name in "abc")
LOAD = Work("load", Doing.LOADING)
PREPARE_A = Work("one", Doing.WORKING, A)
PREFILL_A = Work("one", Doing.PREFILL, A, in_step=True)
PREFILL_B = Work("one", Doing.PREFILL, B, in_step=True)
SUSPECT_C = Work("two", Doing.WORKING, C, is_suspect=True)
DECODE = Work("one", Doing.SERVING, A, in_step=True)
SERVE_B = Work("two", Doing.SERVING, B)
WAITING_C = Work("two", Doing.PREFILL, C, is_suspect=True)


@pytest.mark.parametrize(
    ("works", "models", "requests"),
    [
        ([], "", ()),
        ([SERVE_B], "two", ()),
        ([DECODE, SERVE_B], "one", ()),
        ([DECODE, PREPARE_A, SERVE_B], "one", (A,)),
        ([DECODE, PREFILL_A, PREFILL_B, SERVE_B], "one", (A, B)),
        ([PREFILL_A, SUSPECT_C], "two", (C,)),
        ([PREFILL_A, WAITING_C], "one", (A,)),
        ([LOAD, DECODE, SERVE_B], "load", ()),
        ([LOAD, PREFILL_A], "load", (A,)),
        ([LOAD, SUSPECT_C, PREFILL_A], "two", (C,)),
        ([PREPARE_A, Work("two", Doing.WORKING, C)], "one two", (A, C)),
    ],
)
def test_the_one_that_was_computed_is_charged(
    works: list[Work], models: str, requests: tuple[int, ...]
) -> None:
    is_confirmed = requests == (C,)
    assert cause_of(works) == DeathCause(
        frozenset(models.split()), frozenset(requests), is_confirmed
    )


def test_a_full_disk_costs_the_record_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written before it is mapped: a hole in it would fault at the first store."""

    def full(file: int, content: bytes) -> int:
        del file, content
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    record = ActivityFile(path)
    monkeypatch.undo()
    with record.open_model("m").working("r"):
        assert not path.exists()
    record.close()


def test_a_record_in_use_cannot_be_opened_for_writing(record: ActivityFile, path: Path) -> None:
    """A mapped file that is truncated would end its process."""
    entry = record.begin(0, Doing.SERVING, 7)
    assert path.stat().st_mode & 0o222 == 0
    record.end(entry)
    if os.geteuid():
        with pytest.raises(PermissionError):
            os.truncate(path, 0)


def test_what_is_no_file_holds_up_no_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "activity-pipe")
    (tmp_path / "activity-link").symlink_to("/dev/zero")
    (tmp_path / "activity-folder").mkdir()
    sweep(tmp_path)
    for name in ("pipe", "link", "folder"):
        assert read_activity(tmp_path / f"activity-{name}") is None
