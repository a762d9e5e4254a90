"""Tests of parsing and formatting byte counts."""

import pytest

from core.units import GIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GiB", 12 * GIB),
        ("12 GB", 12 * 10**9),
        ("1.5g", GIB * 3 // 2),
        ("42", 42),
        (7, 7),
        (1.5e10, 15 * 10**9),
    ],
)
def test_parse_bytes_reads(text: str | float, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", "-1", "1e3", "GiB", "12 parsecs", -5, "\u0663", "9" * 500, 10**30, 2**63),
        *(1.5, float("nan"), float("inf"), -1e300, 1e300, True, None, [1], {"a": 1}, b"12"),
    ],
)
def test_parse_bytes_refuses(text: object) -> None:
    with pytest.raises(ValueError, match="byte count"):
        parse_bytes(text)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (12 * GIB, "12.0 GiB")])
def test_format_bytes_shows(count: int, text: str) -> None:
    assert format_bytes(count) == text
