"""Rows of a stepper: who starts, who is preempted, who leads, and who waits for a prefix."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.engine.row_book import RowBook
from backends.engine.rows import Row
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.reuse import Reuse
from backends.prefixes.transfer import Applied
from backends.stepper import SequenceSpec
from core.types import SamplingParams


def row_of(number: int, tokens: Sequence[int] = (1, 2, 3), **fields: Any) -> Row:
    spec = SequenceSpec(number, tuple(tokens), SamplingParams(), 8)
    return Row(spec, array("i", tokens), **fields)


def book_of(rows: int, *, sequences: int = 4) -> RowBook[Row]:
    book = RowBook[Row](sequences, 100)
    for number in range(1, rows + 1):
        book.add(row_of(number))
    return book


def start_all(book: RowBook[Row]) -> None:
    for row in book.admissible():
        row.slot = row.spec.id
        book.start(row)


def ids(rows: Sequence[Row]) -> list[int]:
    return [row.spec.id for row in rows]


class FakeRestore:
    """Hands out one block for each call, then is over."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks
        self.is_cancelled = False

    @property
    def is_over(self) -> bool:
        return not self.left

    def receive(self, reuse: Reuse, apply: Callable[[Any], Applied]) -> None:
        self.left -= 1
        assert apply("block") == "applied"
        reuse.disk += 1

    def cancel(self) -> None:
        self.is_cancelled = True


def test_rows_start_in_order_up_to_the_limit() -> None:
    book = book_of(4, sequences=3)
    start_all(book)
    assert ids(book.running) == [1, 2, 3]
    assert ids(book.waiting) == [4]
    assert list(book.admissible()) == []


def test_a_skipped_row_keeps_its_place() -> None:
    book = book_of(3, sequences=2)
    for row in book.admissible():
        if row.spec.id != 1:
            row.slot = row.spec.id
            book.start(row)
    assert ids(book.running) == [2, 3]
    assert ids(book.waiting) == [1]


def test_the_youngest_is_preempted_and_waits_before_all_others() -> None:
    book = book_of(4, sequences=3)
    start_all(book)
    youngest = book.running[-1]
    youngest.past, youngest.leader = 2, book.running[0]
    assert book.preempt() is youngest
    assert youngest.release_slot() == 3
    assert (youngest.slot, youngest.past) == (-1, 0)
    assert youngest.leader is None
    assert ids(book.running) == [1, 2]
    assert ids(book.waiting) == [3, 4]
    assert book.load(0).preemptions == 1


def test_after_a_preemption_nobody_starts_until_a_running_row_ends() -> None:
    book = book_of(3)
    start_all(book)
    book.preempt().release_slot()
    assert list(book.admissible()) == []
    book.remove(3)
    assert list(book.admissible()) == []
    book.add(row_of(4))
    book.remove(1)
    assert ids(list(book.admissible())) == [4]


def test_after_a_preemption_rows_start_when_none_runs() -> None:
    book = book_of(2)
    start_all(book)
    book.preempt().release_slot()
    book.remove(1)
    assert ids(list(book.admissible())) == [2]


def test_a_single_row_is_never_preempted() -> None:
    book = book_of(1)
    start_all(book)
    problem = book.too_long()
    assert problem is not None
    assert "does not fit the KV cache of 100 tokens" in problem.message
    assert ids(book.running) == [1]
    assert book.load(0).preemptions == 0


def test_a_row_among_others_is_not_too_long() -> None:
    book = book_of(2)
    start_all(book)
    assert book.too_long() is None


def test_a_row_that_failed_while_it_was_placed_is_removed() -> None:
    book = book_of(1)
    (row,) = book.waiting
    row.slot = 3
    assert book.remove(row.spec.id) is row
    assert not book.waiting


def test_preempting_and_removing_cancel_a_restore() -> None:
    book = book_of(2)
    start_all(book)
    restores = [FakeRestore(3), FakeRestore(3)]
    for row, restore in zip(book.running, restores, strict=True):
        row.incoming = restore  # type: ignore[assignment]
    book.preempt()
    assert [restore.is_cancelled for restore in restores] == [False, True]
    removed = book.remove(1)
    assert removed is not None
    assert removed.incoming is None
    assert restores[0].is_cancelled


def test_removing_a_row_that_waits_or_is_unknown() -> None:
    book = book_of(2, sequences=1)
    start_all(book)
    waiting = book.remove(2)
    assert waiting is not None
    assert waiting.slot < 0
    assert book.waiting == []
    assert book.remove(2) is None
    assert book.remove(7) is None
    assert ids(book.running) == [1]


def test_clearing_returns_rows_that_wait_and_that_run() -> None:
    book = book_of(3, sequences=2)
    start_all(book)
    assert ids(book.clear()) == [1, 2, 3]
    assert book.clear() == []
    assert (book.waiting, book.running) == ([], [])


def test_the_leader_is_the_first_row_with_the_longest_shared_prefix() -> None:
    book = RowBook[Row](4, 100)
    for number, tokens in enumerate([(1, 2, 9), (1, 2, 3, 4, 9), (1, 2, 3, 4)]):
        book.add(row_of(number, tokens))
    start_all(book)
    assert book.best_leader(row_of(9, (1, 2, 3, 4, 5))) == (book.running[1], 4)
    assert book.best_leader(row_of(9, (1, 2, 3, 4))) == (book.running[1], 3)
    assert book.best_leader(row_of(9, (7, 8))) == (None, 0)
    assert book.best_leader(row_of(9, (1,))) == (None, 0)


def test_counters() -> None:
    book = book_of(2)
    start_all(book)
    book.running[0].past, book.running[1].past = 3, 2
    book.steps, book.native_cpu_s = 5, 0.5
    assert book.past_tokens == 5
    load = book.load(book.past_tokens, 0.25)
    assert (load.kv_used_tokens, load.kv_tokens, load.steps) == (5, 100, 5)
    assert load.native_cpu_s == 0.75
    assert book.load(1000).kv_used_tokens == 100
    assert [list(tokens) for tokens in book.running_tokens()] == [[1, 2, 3], [1, 2, 3]]


@given(st.lists(st.sampled_from(["add", "admit", "preempt", "remove", "finish"]), max_size=60))
def test_rows_are_never_lost_and_start_oldest_first(actions: Sequence[str]) -> None:
    book = RowBook[Row](3, 100)
    known: list[int] = []
    for number, action in enumerate(actions):
        if action == "add":
            book.add(row_of(number))
            known.append(number)
        elif action == "admit":
            start_all(book)
        elif action == "preempt" and len(book.running) > 1:
            book.preempt().release_slot()
        elif action == "remove" and book.waiting:
            known.remove(book.waiting[-1].spec.id)
            book.remove(book.waiting[-1].spec.id)
        elif action == "finish" and book.running:
            known.remove(book.running[0].spec.id)
            book.remove(book.running[0].spec.id)
        assert ids([*book.running, *book.waiting]) == known
        assert len(book.running) <= 3
        assert all(row.slot >= 0 for row in book.running)
        assert all(row.slot < 0 for row in book.waiting)


class Shared:
    """Notes what a row was offered of its leader's slot."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, row: Row, slot: int, count: int) -> None:
        self.calls.append((slot, count))
        row.past = count


def test_a_row_waits_until_its_leader_has_computed_the_shared_prefix() -> None:
    leader = row_of(1, range(100), slot=5, past=10)
    row, share = row_of(2, range(90), slot=6), Shared()
    row.wait_for(leader, 80)
    assert row.follow(share)
    leader.past = 80
    assert not row.follow(share)
    assert share.calls == [(5, 80)]
    assert not row.follow(share)
    assert len(share.calls) == 1


def test_a_short_prefix_is_not_waited_for() -> None:
    row = row_of(2, range(90), past=10)
    row.wait_for(row_of(1, range(100), slot=5), 10 + SMALLEST_PREFIX - 1)
    assert row.leader is None
    row.wait_for(row_of(1, range(100), slot=5), 10 + SMALLEST_PREFIX)
    assert row.leader is not None


def test_a_leader_that_lost_its_cache_shares_nothing() -> None:
    leader = row_of(1, range(100), slot=5)
    row, share = row_of(2, range(90), slot=6), Shared()
    row.wait_for(leader, 80)
    leader.release_slot()
    assert not row.follow(share)
    assert share.calls == []


@pytest.mark.parametrize(("least_pending", "waits"), [(1, True), (2, False)])
def test_a_leader_before_its_last_token(least_pending: int, waits: bool) -> None:
    leader = row_of(1, range(80), slot=5, past=79)
    row, share = row_of(2, range(90), slot=6), Shared()
    row.wait_for(leader, 80)
    assert row.follow(share, least_pending=least_pending) is waits
    assert share.calls == ([] if waits else [(5, 79)])


def test_blocks_are_received_until_the_restore_is_over() -> None:
    row, blocks = row_of(1), list[Any]()

    def load(to: Row, state: Any) -> Applied:
        assert to is row
        blocks.append(state)
        return "applied"

    assert not row.receive(load)
    row.incoming = FakeRestore(2)  # type: ignore[assignment]
    assert row.receive(load)
    assert not row.receive(load)
    assert row.incoming is None
    assert blocks == ["block", "block"]
    assert row.reuse.disk == 2


def test_reuse_is_final_after_the_first_token() -> None:
    row = row_of(1)
    row.reuse.cells = 2
    output = row.add_token(7, None, is_end=True)
    assert (output.token_id, output.is_end, output.cached, output.prefilled) == (7, True, 2, 3)
    assert list(row.tokens) == [1, 2, 3, 7]
    row.incoming = FakeRestore(1)  # type: ignore[assignment]
    row.receive(lambda *_: "applied")
    assert row.reuse.total == 2


def test_progress_tells_what_is_computed_and_cached() -> None:
    row = row_of(1, past=2)
    row.reuse.cells = 1
    output = row.progress()
    assert (output.token_id, output.prefilled, output.cached) == (None, 2, 1)
