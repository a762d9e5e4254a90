"""Tests of the RAM store of prefixes: byte limit and LRU eviction."""

import numpy as np

from backends.prefixes.match import token_array
from backends.prefixes.ram import RamPrefix, RamPrefixStore


def prefix(tokens: list[int], step: int = 0, size: int = 10) -> RamPrefix:
    return RamPrefix(token_array(tokens), np.zeros(size, np.uint8), step)


def test_longest_finds_the_best_snapshot() -> None:
    store = RamPrefixStore(100)
    short, long = prefix([1, 2]), prefix([1, 3, 4])
    store.put(short)
    store.put(long)
    assert store.longest(token_array([1, 3, 9]), whole_beyond=99) == (long, 2)
    assert store.longest(token_array([1, 2, 9]), whole_beyond=0) == (short, 2)
    assert store.longest(token_array([1, 3, 9]), whole_beyond=0) == (None, 0)


def test_put_replaces_what_it_continues() -> None:
    store = RamPrefixStore(100)
    store.put(prefix([1, 2]))
    store.put(prefix([1, 2, 3]))
    assert store.size_bytes == 10
    assert store.covers(token_array([1, 2]))
    assert not store.covers(token_array([1, 2, 3, 4]))


def test_put_drops_the_least_recently_used_over_the_limit() -> None:
    store = RamPrefixStore(25)
    store.put(prefix([1], step=5))
    store.put(prefix([2], step=1))
    store.put(prefix([3], step=7))
    assert store.size_bytes == 20
    assert not store.covers(token_array([2]))
    assert store.covers(token_array([1]))


def test_a_snapshot_larger_than_the_limit_is_never_made() -> None:
    store = RamPrefixStore(25)
    assert store.has_room_for(25)
    assert not store.has_room_for(26)
    store.put(prefix([1], size=30))
    assert store.size_bytes == 0


def test_clear_forgets_everything() -> None:
    store = RamPrefixStore(25)
    store.put(prefix([1]))
    store.clear()
    assert store.longest(token_array([1]), whole_beyond=99) == (None, 0)
