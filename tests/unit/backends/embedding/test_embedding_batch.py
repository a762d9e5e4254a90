"""Tests of how inputs of embedding requests are put into batches."""

import asyncio
from collections import deque
from collections.abc import Iterator

import pytest

from backends.embedding.batch import Batch, BatchLimits, QueuedRequest, next_batch


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def queued(loop: asyncio.AbstractEventLoop, *lengths: int, due_at: float = 0.0) -> QueuedRequest:
    """Return a request whose inputs have these lengths."""
    request = QueuedRequest(["x"] * len(lengths), loop, loop.create_future(), due_at)
    request.token_lists = [[7] * length for length in lengths]
    request.left = sorted((length, index) for index, length in enumerate(lengths))
    return request


def lengths_of(batch: Batch) -> list[int]:
    return [len(request.token_lists[index]) for request, index in batch]


def all_batches(queue: "deque[QueuedRequest]", limits: BatchLimits) -> list[list[int]]:
    batches = []
    while queue:
        batches.append(lengths_of(next_batch(queue, limits, 1.0)))
        for request in [request for request in queue if not request.left]:
            queue.remove(request)
    return batches


def test_padded_rows_count_as_long_as_the_longest(loop: asyncio.AbstractEventLoop) -> None:
    queue = deque([queued(loop, 6, 1, 2, 5)])
    assert all_batches(queue, BatchLimits(12)) == [[5, 6], [1, 2]]


def test_packed_rows_count_as_long_as_they_are(loop: asyncio.AbstractEventLoop) -> None:
    queue = deque([queued(loop, 6, 1, 2, 5)])
    assert all_batches(queue, BatchLimits(12, is_packed=True)) == [[1, 5, 6], [2]]


def test_packed_batch_skips_inputs_that_do_not_fit(loop: asyncio.AbstractEventLoop) -> None:
    queue = deque([queued(loop, 8, 8, 3), queued(loop, 9, 2)])
    assert lengths_of(next_batch(queue, BatchLimits(14, is_packed=True), 1.0)) == [3, 8, 2]


def test_rows_of_a_batch_are_bounded(loop: asyncio.AbstractEventLoop) -> None:
    queue = deque([queued(loop, *[1] * 70)])
    batches = all_batches(queue, BatchLimits(512, 32, is_packed=True))
    assert [len(batch) for batch in batches] == [32, 32, 6]


@pytest.mark.parametrize("is_packed", [False, True])
def test_input_longer_than_a_batch_is_computed_alone(
    loop: asyncio.AbstractEventLoop, is_packed: bool
) -> None:
    queue = deque([queued(loop, 9, 1)])
    assert all_batches(queue, BatchLimits(8, is_packed=is_packed)) == [[9], [1]]


def test_requests_take_turns_in_opening_batches(loop: asyncio.AbstractEventLoop) -> None:
    first, second = queued(loop, 4, 4), queued(loop, 3)
    queue = deque([first, second])
    assert [next_batch(queue, BatchLimits(4), 1.0)[0][0] for _ in range(3)] == [
        first,
        second,
        first,
    ]


def test_requests_that_are_not_due_go_last(loop: asyncio.AbstractEventLoop) -> None:
    batch, interactive = queued(loop, 4, due_at=30.0), queued(loop, 4)
    queue = deque([batch, interactive])
    assert next_batch(queue, BatchLimits(4), 1.0) == [(interactive, 0)]
    assert batch.begun_at > 1.0 == interactive.begun_at


def test_empty_queue_gives_no_batch() -> None:
    assert next_batch(deque(), BatchLimits(8), 1.0) == []
