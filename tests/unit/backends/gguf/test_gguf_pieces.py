"""Special tokens are found where they are, and the search ends with its request."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.cancellation import Cancelled, cancelled_by
from backends.gguf.pieces import Specials

LETTERS = "<|>a]^-\\\n é"
SPECIALS = st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=8)


def ends_by_trying_all(text: str, specials: list[str]) -> Iterator[int]:
    """Yield what `Specials.find_ends` shall yield: the longest special token at each place."""
    at = 0
    while at < len(text):
        longest = max((len(each) for each in specials if text.startswith(each, at)), default=0)
        if longest:
            yield at + longest
        at += longest or 1


@given(SPECIALS, st.text(LETTERS, max_size=60))
@example(["<", "<|a|>"], "<<|a|><|a")
@example(["<|", "|>"], "<|>")
@example([], "a")
def test_special_tokens_are_found_as_by_trying_all(specials: list[str], text: str) -> None:
    found = list(Specials(specials).find_ends(text))
    assert found == list(ends_by_trying_all(text, specials))


@given(SPECIALS.filter(bool), st.data())
def test_special_tokens_side_by_side_are_found(specials: list[str], data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from([*specials, "a"]), max_size=12)))
    found = list(Specials(specials).find_ends(text))
    assert found == list(ends_by_trying_all(text, specials))


def test_only_places_where_a_special_token_may_start_are_looked_at() -> None:
    specials = Specials([f"<|special_{index}|>" for index in range(255)])
    assert not list(specials._heads.finditer("<" * 100_000))
    assert list(specials.find_ends("<" * 1000 + "<|special_254|>" + "<|special_255|>")) == [1015]


def test_the_search_ends_when_its_request_is_cancelled() -> None:
    gone = threading.Event()
    with cancelled_by(gone):
        ends = Specials(["<s>"]).find_ends("<s>" * 10)
        assert next(ends) == 3
        gone.set()
        with pytest.raises(Cancelled):
            next(ends)
