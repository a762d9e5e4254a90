"""What is known of failing models outlives the scheduler's process, not the server."""

from pathlib import Path

import pytest

from core.errors import BrokenModel, ModelFailed, ModelQuarantined
from deployments.scheduler.faults import FaultFile, Faults


def faults(path: Path, session: str = "one", now: float = 100.0) -> Faults:
    return Faults(FaultFile(path, session), clock=lambda: now)


def test_a_quarantine_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    before = faults(path)
    for process in ("p1", "p2"):
        assert not before.record_death("m", "files", process, "")
    # Another process counts on: the deaths so far are known.
    after = faults(path)
    assert after.record_death("m", "files", "p3", "out of memory")
    with pytest.raises(ModelQuarantined, match="out of memory"):
        faults(path).check("m", "files")


def test_a_failed_load_is_left_alone_as_long_as_before(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    faults(path).record_failure("m", "files", BrokenModel("It is damaged."))
    with pytest.raises(ModelFailed, match="It is damaged") as caught:
        faults(path, now=103.0).check("m", "files")
    assert caught.value.retry_after_s == 2
    faults(path, now=106.0).check("m", "files")


def test_what_is_forgiven_stays_forgiven(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    faults(path).record_failure("m", "files", BrokenModel("It is damaged."))
    faults(path).clear("m")
    assert faults(path).current() == {}
    # So it is with other files under the same name.
    faults(path).record_failure("m", "files", BrokenModel("It is damaged."))
    faults(path).check("m", "others")
    assert faults(path).current() == {}


def test_another_session_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    faults(path).record_failure("m", "files", BrokenModel("It is damaged."))
    faults(path, session="two").check("m", "files")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"session": "one"}', '{"session": "one", "records": {"m": {}}}',
             '{"session": "one", "records": {"m": 3}}',
             '{"session": "one", "records": {"m": {"files": "f", "deaths": []}}}',
             "\x00" * 10],
)  # fmt: skip
def test_a_damaged_file_is_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "faults.json"
    path.write_text(text)
    assert faults(path).current() == {}


def test_a_full_disk_costs_the_memory_only(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "faults.json"
    known = faults(path)
    known.record_failure("m", "files", BrokenModel("It is damaged."))
    with pytest.raises(ModelFailed):
        known.check("m", "files")
    assert list(tmp_path.iterdir()) == []
