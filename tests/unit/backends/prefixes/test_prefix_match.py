"""Tests of the longest common prefix, and of the eviction order of retained sequences."""

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from backends.prefixes.match import RetainedPrefixes, common_prefix, token_array

tokens = st.lists(st.integers(0, 2), max_size=30)


@given(left=tokens, right=tokens)
def test_common_prefix_agrees_with_a_plain_comparison(left: list[int], right: list[int]) -> None:
    pairs = zip(left, right, strict=False)
    expected = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    assert common_prefix(token_array(left), token_array(right)) == expected


def kept() -> RetainedPrefixes:
    retained = RetainedPrefixes()
    retained.keep(0, token_array([1, 2, 3]), step=5)
    retained.keep(1, token_array([1, 2, 3, 4, 9]), step=3)
    return retained


def test_longest_finds_the_best_entry() -> None:
    entry, length = kept().longest(token_array([1, 2, 3, 4, 5]), whole_beyond=99)
    assert entry is not None
    assert (entry.slot, length) == (1, 4)


def test_longest_takes_whole_entries_only_where_states_cannot_be_cut() -> None:
    entry, length = kept().longest(token_array([1, 2, 3, 4, 5]), whole_beyond=0)
    assert entry is not None
    assert (entry.slot, length) == (0, 3)


def test_longest_finds_nothing_without_a_shared_token() -> None:
    assert kept().longest(token_array([7]), whole_beyond=99) == (None, 0)


def test_oldest_is_the_least_recently_used() -> None:
    retained = kept()
    oldest = retained.oldest()
    assert oldest is not None
    assert oldest.slot == 1
    spared = retained.oldest(but=1)
    assert spared is not None
    assert spared.slot == 0
    retained.forget(0)
    assert retained.oldest(but=1) is None
