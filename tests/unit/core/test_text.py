"""Text of unknown origin is shown escaped and short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.text import escaped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, Grüße 海 🎈", "plain text, Grüße 海 🎈"),
        ("a\u202eb", r"a\u202eb"),
        ("a\r\nSet-Cookie: b", r"a\r\nSet-Cookie: b"),
        ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
        ("\ud83d", r"\ud83d"),
        ("\u200b\u2066\ufeff", r"\u200b\u2066\ufeff"),
        ("\u2028", r"\u2028"),
        ("", ""),
        ("x" * 201, "x" * 200 + "…"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    assert escaped(text) == shown


@given(st.text(st.characters()), st.integers(0, 50))
def test_the_result_is_printable_and_bounded(text: str, limit: int) -> None:
    shown = escaped(text, limit)
    assert shown.isprintable()
    assert len(shown) <= 10 * limit + 1
    shown.encode()
