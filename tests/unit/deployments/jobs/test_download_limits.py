"""The user's limits for downloads: stored, checked, and applied to the queue."""

from pathlib import Path

import pytest

from catalog.jobs import Hours, JobLimits
from core.errors import RequestError
from deployments.jobs.limits import DownloadLimits, LimitsFile


def test_limits_are_stored(tmp_path: Path) -> None:
    file = LimitsFile(tmp_path / "limits.json")
    assert file.read() == DownloadLimits()
    limits = DownloadLimits(3, 1000, "22:30-06:00")
    file.write(limits)
    assert LimitsFile(tmp_path / "limits.json").read() == limits


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"parallel": 0}', '{"parallel": "3"}', '{"other": 1}', '{"hours": 5}', "\x00" * 9],
)
def test_damaged_limits_are_the_usual_ones(tmp_path: Path, text: str) -> None:
    path = tmp_path / "limits.json"
    path.write_text(text)
    assert LimitsFile(path).read() == DownloadLimits()


@pytest.mark.parametrize(
    "limits",
    [DownloadLimits(0), DownloadLimits(9), DownloadLimits(bytes_per_s=-1),
     DownloadLimits(hours="late")],
)  # fmt: skip
def test_what_is_no_limit_is_refused(limits: DownloadLimits) -> None:
    with pytest.raises(RequestError):
        limits.check()


def test_limits_are_applied_to_their_kind() -> None:
    held = JobLimits(held={"other": "hot"})
    applied = DownloadLimits(2, 9, "01:00-02:00").applied_to(held, "download")
    assert applied == JobLimits({"download": 2}, {"download": Hours(60, 120)}, held.held)
    assert DownloadLimits().applied_to(held, "download").hours == {}
