"""The page of promises names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NUMBERS = [
    *(f"N{number}" for number in range(1, 20)),
    *(f"D{number}" for number in range(1, 16)),
    *(f"P{number}" for number in range(1, 8)),
    *("S5", "S6", "S7", "S8", "O6", "O8"),
]
NAMED = sorted(set(re.findall(r"`((?:unit|contract|integration)/[\w/]+\.py)(?:::(\w+))?`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file: str, name: str) -> None:
    source = (ROOT / "tests" / file).read_text()
    assert f"def {name}(" in source if name else "def test_" in source


def test_no_figure_is_left_out() -> None:
    assert not re.findall(r"\b[A-Z]{4,}_[A-Z]+\b", PAGE.replace("IMPETUS_MAX_BODY", ""))


def test_every_promise_of_a_table_has_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    unproved = [row for row in rows if ".py" not in row and "| tests |" not in row]
    assert len(rows) > 30
    assert unproved == []


def test_every_number_has_its_tests() -> None:
    rows = re.findall(r"^\| ([A-Z]\d+) \| .* \| (.*) \|$", PAGE, re.MULTILINE)
    assert [number for number, _ in rows if number in NUMBERS] == NUMBERS
    assert [number for number, tests in rows if ".py" not in tests] == []
