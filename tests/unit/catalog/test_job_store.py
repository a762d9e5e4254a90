"""Jobs survive kills, damage and full disks, as far as the disk has them."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from catalog import jobs
from catalog.job_store import MAX_ENDED, JobStore
from catalog.jobs import Job
from core.errors import CatalogNotWritten, ImpetusError

ROOT = Path(__file__).parents[3]
CHILD = """
import sys
from pathlib import Path
from dataclasses import replace
from catalog.job_store import JobStore
from catalog.jobs import Job
store = JobStore(Path(sys.argv[1]))
job = Job("a", "download", "a", "{}", 1.0, 1.0)
for number in range(10**9):
    store.save([replace(job, id=f"{number % 50}", done=number, total=number),
                replace(job, id=f"{number % 50}-twin", done=number, total=number)])
    print(number, flush=True)
"""


def job(name: str = "a", rank: float = 1.0) -> Job:
    return Job(name, "download", f"Model {name}", '{"x": 1}', created=5.0, rank=rank)


def test_jobs_are_stored_in_the_order_of_their_queue(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "home" / "jobs.sqlite")
    store.save([job("a", 3.0), job("b", 1.0), job("c", 2.0)])
    running = jobs.wait(jobs.start(job("b", 1.0), 6.0), "Why", "hub_offline", 70.0)
    store.save([running])
    store.close()
    store.close()
    again = JobStore(tmp_path / "home" / "jobs.sqlite")
    assert again.jobs() == [running, job("c", 2.0), job("a", 3.0)]
    again.remove("c")
    again.remove("none")
    assert [one.id for one in again.jobs()] == ["b", "a"]
    again.close()


@pytest.mark.parametrize("after", [1, 20, 60])
def test_jobs_survive_the_kill_of_their_process(tmp_path: Path, after: int) -> None:
    path = tmp_path / "jobs.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        saved = [int(child.stdout.readline()) for _ in range(after)][-1]
        child.send_signal(signal.SIGKILL)
    store = JobStore(path)
    found = {one.id: one.done for one in store.jobs()}
    store.close()
    assert found[f"{saved % 50}"] >= saved
    # Both of a transaction, or neither.
    assert all(found[f"{name}-twin"] == done for name, done in found.items() if "-" not in name)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_jobs_that_are_committed_are_on_the_disk_s6(
    tmp_path: Path, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    store = JobStore(tmp_path / "jobs.sqlite")
    values = {
        name: store._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "fullfsync", "checkpoint_fullfsync")
    }
    store.close()
    is_mac = int(platform == "darwin")
    assert values == {
        "journal_mode": "wal", "synchronous": 2,
        "fullfsync": is_mac, "checkpoint_fullfsync": is_mac,
    }  # fmt: skip


def test_jobs_that_are_over_are_kept_for_a_while(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    ended = [
        replace(job(f"{number:04}"), state="done", ended=float(number))
        for number in range(MAX_ENDED + 20)
    ]
    store.save([*ended, job("queued")])
    kept = {one.id for one in store.jobs()}
    assert len(kept) == MAX_ENDED + 1
    assert {"queued", "0020"} <= kept
    assert "0019" not in kept
    store.close()


@pytest.mark.parametrize("is_old", [False, True])
def test_jobs_can_be_read_by_their_owner_only(tmp_path: Path, is_old: bool) -> None:
    """D12: the address of a download may have a secret in its query."""
    path = tmp_path / "jobs.sqlite"
    if is_old:
        JobStore(path).close()
        path.chmod(0o644)
    store = JobStore(path)
    store.save([job()])
    modes = {file.name: file.stat().st_mode & 0o077 for file in tmp_path.iterdir()}
    store.close()
    assert modes == dict.fromkeys(("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"), 0)


def test_jobs_in_a_damaged_file_are_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"not a database, and long enough to be read as one" * 100)
    store = JobStore(path)
    assert store.jobs() == []
    store.save([job()])
    assert store.jobs() == [job()]
    store.close()
    assert (tmp_path / "jobs.sqlite.corrupt-1").exists()


def test_jobs_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore(path)
    store.save([job("a")])
    later = {**json.loads(json.dumps({"id": "b", "kind": "scan", "title": "", "work": "{}"}))}
    later |= {"created": 1.0, "rank": 9.0, "of_a_later_version": True}
    with sqlite3.connect(path) as connection:
        for name, text in (("x", "no json"), ("y", "[]"), ("z", "{}"), ("b", json.dumps(later))):
            connection.execute("INSERT INTO jobs VALUES (?, NULL, ?)", (name, text))
    connection.close()
    assert [one.id for one in store.jobs()] == ["a", "b"]
    store.close()


def test_jobs_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ImpetusError, match="newer version of Impetus"):
        JobStore(path)


def test_jobs_that_cannot_be_written_say_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ImpetusError, match="cannot be opened"):
        JobStore(tmp_path / "file" / "jobs.sqlite")
    store = JobStore(tmp_path / "jobs.sqlite")
    store.save([job("a")])
    other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._connection.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(CatalogNotWritten, match="locked") as problem:
        store.save([job("b")])
    assert problem.value.retry_after_s == 10
    other.execute("ROLLBACK")
    other.close()
    store.save([job("b")])
    assert [one.id for one in store.jobs()] == ["a", "b"]
    store.close()
    with pytest.raises(CatalogNotWritten):
        store.jobs()
    assert os.path.exists(tmp_path / "jobs.sqlite")
