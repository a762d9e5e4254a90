"""Tests of lower bounds of a text's length in tokens."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.cancellation import Cancelled, cancelled_by
from backends.token_bounds import fewest_tokens


def unused(_: str) -> int:
    raise AssertionError("nothing is tokenized")


def test_text_that_may_well_fit_is_not_looked_at() -> None:
    assert fewest_tokens("a" * 600, 100, lambda: unused(""), unused) == 0


def test_bytes_alone_can_tell_that_a_text_is_too_long() -> None:
    assert fewest_tokens("é" * 50_000, 100, lambda: 10, unused) == 10_000


def test_counting_stops_as_soon_as_the_limit_is_exceeded() -> None:
    counted: list[int] = []

    def count(piece: str) -> int:
        counted.append(len(piece))
        return len(piece)

    assert fewest_tokens("a" * 8_000_000, 1000, lambda: None, count) > 1000
    assert len(counted) == 1


@given(st.integers(1, 60), st.integers(1, 4000), st.integers(0, 300_000))
def test_the_bound_is_never_over_the_true_number(width: int, limit: int, size: int) -> None:
    def count(text: str) -> int:
        return -(-len(text) // width)

    bound = fewest_tokens("a" * size, limit, lambda: None, count)
    assert bound <= max(count("a" * size), 0)


def test_counting_stops_when_the_request_is_cancelled() -> None:
    gone = threading.Event()

    def count(_: str) -> int:
        assert not gone.is_set()
        gone.set()
        return 0

    with cancelled_by(gone), pytest.raises(Cancelled):
        fewest_tokens("a" * 8_000_000, 1000, lambda: None, count)
