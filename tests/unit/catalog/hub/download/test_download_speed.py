"""Speed and stalls of downloads, with a clock of the test's own (D4)."""

import pytest

from catalog.hub.download.speed import STALLED_S, SpeedWindow
from catalog.hub.download.transfer import Pace


def test_download_speed_is_that_of_the_last_30_seconds() -> None:
    window = SpeedWindow(10_000, 0.0)
    window.add(0, 0.0)
    for second in range(1, 11):
        window.add(second * 100, float(second))
    assert window.speed(10.0) == pytest.approx(100.0)
    assert window.remaining_s(10.0) == pytest.approx(90.0)
    # Five times as fast from now on: the slow start leaves the window.
    for second in range(11, 42):
        window.add(1000 + (second - 10) * 500, float(second))
    assert window.speed(41.0) == pytest.approx(500.0)


def test_download_that_stalls_shows_zero_and_no_end() -> None:
    window = SpeedWindow(10_000, 0.0)
    assert (window.speed(0.0), window.remaining_s(0.0), window.stalled_s(3.0)) == (0.0, None, 3.0)
    window.add(0, 0.0)
    window.add(5000, 5.0)
    assert window.speed(5.0) == pytest.approx(1000.0)
    assert 0 < window.speed(5.0 + STALLED_S - 1) < 1000.0
    assert window.speed(5.0 + STALLED_S) == 0.0
    assert window.remaining_s(5.0 + STALLED_S) is None
    assert window.stalled_s(45.0) == 40.0
    # The same number again is no progress.
    window.add(5000, 46.0)
    assert window.stalled_s(46.0) == 41.0
    window.add(6000, 50.0)
    assert window.speed(50.0) > 0.0


def test_download_that_loses_bytes_has_no_negative_speed() -> None:
    window = SpeedWindow(100, 0.0)
    window.add(80, 1.0)
    window.add(0, 2.0)
    assert window.speed(2.0) == 0.0


def test_download_that_goes_on_does_not_count_what_was_there() -> None:
    window = SpeedWindow(10_000, 100.0)
    window.add(9000, 100.0)
    window.add(9100, 101.0)
    assert window.speed(101.0) == pytest.approx(100.0)


def test_download_speed_is_that_of_the_network_alone() -> None:
    """Parts of several files are found one after the other, while they are read."""
    window = SpeedWindow(10_000, 0.0)
    window.add(1000, 1.0, 1000)
    window.add(8000, 20.0, 8000)
    assert (window.speed(20.0), window.remaining_s(20.0)) == (0.0, None)
    window.add(8100, 21.0, 8000)
    assert window.speed(21.0) == pytest.approx(100.0)
    assert window.remaining_s(21.0) == pytest.approx(19.0)
    # Copied from another model: it goes on, but says nothing of the network.
    window.add(9100, 22.0, 9000)
    assert window.speed(22.0) == pytest.approx(50.0)
    window.add(9900, 31.5, 9800)
    assert (window.speed(31.5), window.stalled_s(31.5)) == (0.0, 0.0)
    # Thrown away, because it was damaged.
    window.add(9000, 32.0, 8900)
    assert window.speed(32.0) == 0.0


def test_download_pace_waits_until_the_bytes_are_due() -> None:
    waited: list[float] = []
    pace = Pace(1000, waited.append)
    pace.passed(500, 10.0)
    pace.passed(500, 10.5)
    pace.passed(100, 20.0)
    assert waited == pytest.approx([0.5, 0.5, 0.1])
    # A longer wait ends with the limit.
    waited.clear()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            slow.change(0)

    slow = Pace(100, wait)
    slow.passed(1000, 10.0)
    assert waited == [1.0, 1.0, 1.0]
    slow.passed(1000, 13.0)
    assert len(waited) == 3
    Pace(0, waited.append).passed(10**9, 0.0)
    assert len(waited) == 3
    assert len(waited) == 3
