"""Samples of a day, and their summaries for charts."""

import threading

import pytest

from router.monitor.history import ChartLine, History, LineName

USED = LineName("memory", "used")
CPU = LineName("cpu", "router")


def model(name: str) -> LineName:
    return LineName("memory", "model", name)


def filled(count: int, **options: float) -> History:
    """Return a history whose sample of second 10 n has the value n."""
    history = History(**options)  # type: ignore[arg-type]
    for number in range(count):
        history.record(number * 10.0, {USED: float(number)})
    return history


def only(lines: list[ChartLine]) -> ChartLine:
    (line,) = lines
    return line


def test_each_step_has_least_mean_and_greatest() -> None:
    line = only(filled(12).lines("memory", 0.0, 40.0, 4))
    assert line.least == [0, 4, 8, None]
    assert line.mean == [1.5, 5.5, 9.5, None]
    assert line.most == [3, 7, 11, None]
    line = only(filled(12).lines("memory", 30.0, 10.0, 2))
    assert line.mean == [3, 4]


def test_ring_keeps_its_span_and_no_more() -> None:
    history = filled(250, span_s=1000.0)
    line = only(history.lines("memory", 0.0, 10.0, 250))
    assert line.mean == [None] * 150 + [float(number) for number in range(150, 250)]


def test_lines_have_gaps_where_they_had_no_value() -> None:
    history = History()
    for at, values in ((0, {model("a"): 1.0}), (10, {CPU: 0.5}), (20, {model("a"): 3.0})):
        history.record(at, values)
    line = only(history.lines("memory", 0.0, 10.0, 3))
    assert (line.name, line.mean) == (model("a"), [1, None, 3])
    assert only(history.lines("cpu", 0.0, 10.0, 3)).mean == [None, 0.5, None]
    assert history.lines("memory", 30.0, 10.0, 3) == []
    assert history.lines("tokens", 0.0, 10.0, 3) == []


def test_old_values_of_a_line_do_not_come_back_after_a_round() -> None:
    history = History(span_s=50.0)
    history.record(0.0, {model("a"): 1.0, USED: 1.0})
    for number in range(1, 7):
        history.record(number * 10.0, {USED: 1.0})
    assert [line.name for line in history.lines("memory", 0.0, 10.0, 100)] == [USED]


def test_time_asleep_is_a_gap_and_a_clock_set_back_is_bearable() -> None:
    history = History()
    for at in (0.0, 10.0, 3600.0, 3590.0):
        history.record(at, {USED: at})
    line = only(history.lines("memory", 0.0, 600.0, 7))
    assert line.mean == [5.0, None, None, None, None, 3590.0, 3600.0]


def test_number_of_lines_is_bounded_by_dropping_the_oldest() -> None:
    history = History(span_s=100.0, max_lines=3)
    for number in range(6):
        history.record(number * 10.0, {USED: 1.0, model(f"m{number}"): 1.0})
    names = [line.name for line in history.lines("memory", 0.0, 10.0, 10)]
    assert names == [model("m4"), model("m5"), USED]


def test_quantiles_of_times_to_the_first_token() -> None:
    history = History()
    history.record(0.0, {}, [0.1] * 90 + [2.0] * 10)
    history.record(10.0, {}, [0.1])
    history.record(20.0, {}, [])
    p50, p95 = history.lines("first_token", 0.0, 20.0, 2)
    assert (p50.name.label, p95.name.label) == ("p50", "p95")
    assert p50.mean == [pytest.approx(0.1, rel=0.03), None]
    assert p95.mean == [pytest.approx(2.0, rel=0.03), None]
    assert p95.least[0] == pytest.approx(0.1, rel=0.03)
    assert p95.most[0] == pytest.approx(2.0, rel=0.03)
    many = History()
    many.record(0.0, {}, [number / 1000 for number in range(1000)])
    p50, p95 = many.lines("first_token", 0, 10, 1)
    assert p50.mean[0] == pytest.approx(0.5, abs=0.02)
    assert p95.mean[0] == pytest.approx(0.95, abs=0.02)


def test_charts_are_read_while_samples_are_added() -> None:
    history, problems = filled(2000), []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                history.lines("memory", 0.0, 100.0, 600)
            except Exception as problem:
                problems.append(problem)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(2000, 2300):
        history.record(number * 10.0, {USED: 1.0, model(f"m{number % 7}"): 2.0}, [0.1])
    stop.set()
    thread.join()
    assert problems == []
