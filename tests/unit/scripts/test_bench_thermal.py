"""Tests of the thermal benchmark's record and plot."""

from typing import Any
from xml.etree import ElementTree

import pytest

from scripts.bench_lib.client import StreamRecord
from scripts.bench_lib.report.figures import Spread
from scripts.bench_lib.report.plot import Band, Chart, Line, draw
from scripts.bench_lib.thermal import Run, Samples, picture, planned_tokens
from scripts.bench_lib.turns import TurnsResult, measure_turns, turns_table, turns_verdict

NAMESPACE = "{http://www.w3.org/2000/svg}"


def record(*arrivals: float, reason: str = "length", error: str = "") -> StreamRecord:
    return StreamRecord(arrivals=list(arrivals), finish_reason=reason, error=error)


def test_lost_streams_are_named() -> None:
    run = Run(Samples(), [record(), record(reason="stop"), record(error="it broke")], 0.0)
    assert run.lost == ["it ended with 'stop'", "it broke"]


def test_answers_are_planned_to_end_with_the_run() -> None:
    # At 0.1 s a step: 240 steps, 25 s of 0.12 s, 53 s of 0.2 s, 180 steps.
    assert planned_tokens(0.1) == 240 + 208 + 265 + 180


def test_rates_add_up_all_streams_by_the_second() -> None:
    run = Run(Samples(), [record(100.1, 100.9, 102.5), record(100.2)], 100.0)
    assert run.rates == [(0.5, 3.0), (1.5, 0.0), (2.5, 1.0)]


def elements(text: str, kind: str) -> list[Any]:
    return list(ElementTree.fromstring(text).iter(f"{NAMESPACE}{kind}"))


def test_the_picture_shows_what_was_sampled() -> None:
    samples = Samples(
        used_bytes=[(0.0, 3e8), (10.0, 1e8)],
        state=[(0.0, 0.0), (4.0, 2.0), (6.0, 2.0), (8.0, 3.0), (10.0, -1.0)],
    )
    text = picture(Run(samples, [record(101.0, 105.0)], 100.0))
    assert len(elements(text, "path")) == 3
    shades = [rect.get("fill") for rect in elements(text, "rect")][1:]
    # One stretch for each state that throttles, in each of the three charts.
    assert shades == ["#fef3c7", "#fee2e2"] * 3
    words = {element.text for element in elements(text, "text")}
    assert {"nominal", "fair", "serious", "critical", "seconds"} <= words


def test_lines_lie_inside_and_texts_are_escaped() -> None:
    lines = [Line("a", [(0, 0), (10, 5)]), Line("b", [(0, 5), (10, 0)], is_step=True)]
    text = draw("<hot & cold>", [Chart("y", lines)], [Band(2, 4, "#eee")], 10)
    first, second = (element.get("d") for element in elements(text, "path"))
    assert first.startswith("M92.0,190.0 L844.0")
    assert "H844.0" in second
    assert elements(text, "text")[0].text == "<hot & cold>"


@pytest.mark.parametrize(("shared", "is_reached"), [(7.0, True), (20.5, False)])
def test_a_turn_is_judged_beside_a_second_process(shared: float, is_reached: bool) -> None:
    result = TurnsResult(Spread(1, 1, 1), Spread(shared, 1, 99))
    assert turns_verdict(result).is_reached is is_reached
    assert f"{shared:.1f} (1.0–99.0)" in turns_table(result)


def test_turns_are_measured_with_a_second_process() -> None:
    result = measure_turns(rounds=3, turns=20)
    assert result.shared.high > 0
