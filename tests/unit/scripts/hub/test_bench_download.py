"""The benchmark's downloads: ratios by round, and one small real run of both sides."""

import pytest

from core.units import MIB
from scripts.bench_lib.download import (
    DOWNLOAD_HEAD,
    PEER,
    DownloadRun,
    download_rows,
    download_verdicts,
    measure_downloads,
)
from scripts.bench_lib.servers import OURS


@pytest.mark.parametrize(
    ("seconds", "cpu_s", "words"),
    [
        (1.0, 1.0, ["PASS", "PASS"]),
        (1.1, 1.19, ["PASS", "PASS"]),
        (1.1, 1.21, ["PASS", "MISS"]),
        (1.2, 1.0, ["MISS", "PASS"]),
    ],
)
def test_download_targets(seconds: float, cpu_s: float, words: list[str]) -> None:
    runs = {OURS: [DownloadRun(seconds, cpu_s)] * 3, PEER: [DownloadRun(1.0, 1.0)] * 3}
    assert [verdict.word for verdict in download_verdicts(runs)] == words


def test_download_without_the_peer_is_not_measured() -> None:
    runs = {OURS: [DownloadRun(2.0, 1.0)]}
    assert {verdict.word for verdict in download_verdicts(runs)} == {"NOT MEASURED"}
    assert download_rows(runs, 100 * MIB) == [(OURS, "50 (50–50)", "2.00 (2.00–2.00)",
                                               "1.00 (1.00–1.00)")]  # fmt: skip
    assert len(DOWNLOAD_HEAD) == 4


def test_download_of_both_sides_is_measured() -> None:
    runs = measure_downloads(1, file_bytes=MIB)
    assert list(runs) == [OURS, PEER]
    assert all(run.seconds > 0 and run.cpu_s > 0 for found in runs.values() for run in found)
