"""How many processes each format gets."""

import pytest

from scheduler.scaling import (
    FormatDemand,
    FormatUse,
    ScalingDirective,
    desired_processes,
    finished,
)

CALM = ScalingDirective()
HOT = ScalingDirective(admits=False)


def demand(requests: float, processes: int, least: int = 0, most: int = 1) -> FormatDemand:
    return FormatDemand(requests, processes, least, most, served=4.0)


@pytest.mark.parametrize(
    ("one", "directive", "expected"),
    [
        (demand(0, 0), CALM, 0),
        (demand(1, 0), CALM, 1),
        (demand(0, 0, least=1), CALM, 1),
        (demand(1, 0), HOT, None),
        (demand(0, 0), HOT, 0),
        (demand(1, 1), HOT, 1),
        (demand(9, 1, most=3), CALM, 1),
        (demand(9, 1, most=3), ScalingDirective(growing=("f",)), 2),
        (demand(9, 1, most=1), ScalingDirective(growing=("f",)), 1),
        (demand(4, 1, most=3), ScalingDirective(growing=("f",)), 1),
        (demand(0, 2, most=3), ScalingDirective(growing=("f",)), 2),
        (demand(0, 2), ScalingDirective(finished=("f",)), 0),
        (demand(0, 2, least=1), ScalingDirective(finished=("f",)), 1),
        (demand(0.1, 1), ScalingDirective(finished=("f",)), 1),
        (demand(0, 1), ScalingDirective(finished=("g",)), 1),
    ],
)
def test_processes(one: FormatDemand, directive: ScalingDirective, expected: int | None) -> None:
    assert desired_processes({"f": one}, directive).get("f") == expected


def test_a_format_ends_when_nobody_needs_it() -> None:
    uses = {
        "idle": FormatUse(300.0),
        "recent": FormatUse(299.0),
        "pinned": FormatUse(900.0, is_kept=True),
        "busy": FormatUse(900.0, is_busy=True),
    }
    assert finished(uses, 300.0, unloads_idle=False) == ["idle"]
    assert finished(uses, 300.0, unloads_idle=True) == ["idle", "recent"]


def test_the_directive_survives_its_text() -> None:
    directive = ScalingDirective(False, ("a",), ("b", "c"))
    assert ScalingDirective.from_json(directive.to_json()) == directive
    for text in ("", "{}", "[]", "null"):
        with pytest.raises((ValueError, KeyError, TypeError)):
            ScalingDirective.from_json(text)
