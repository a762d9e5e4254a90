"""The feed of jobs: only what changed is told, in the order of the queue, over restarts as well."""

import asyncio

import pytest

from deployments.jobs.feed import JobFeed
from router.job_service import JobChanges, JobView
from tests.unit.router.events.sources import job_view


class Queue:
    """Jobs that a test changes."""

    def __init__(self, *ids: str) -> None:
        self.views = {one: job_view(one) for one in ids}
        self.asked: list[str] = []
        self.feed = self.new_feed()
        self.version = -1

    def new_feed(self) -> JobFeed:
        return JobFeed(lambda: list(self.views), self._view)

    def _view(self, job_id: str) -> JobView:
        self.asked.append(job_id)
        return self.views[job_id]

    def set(self, job_id: str, done: int) -> None:
        self.views[job_id] = job_view(job_id, done)
        self.feed.touch(job_id)

    async def next(self, limit_s: float = 0.0) -> JobChanges:
        changes = await self.feed.wait(self.version, limit_s)
        self.version = changes.version
        return changes


@pytest.fixture
async def queue() -> Queue:
    queue = Queue("a", "b", "c")
    first = await queue.next()
    assert (first.is_whole, first.ids) == (True, ("a", "b", "c"))
    assert [one.id for one in first.jobs] == ["a", "b", "c"]
    return queue


async def test_only_changed_jobs_are_told_and_looked_at(queue: Queue) -> None:
    queue.asked.clear()
    queue.set("b", 5)
    changes = await queue.next()
    assert (changes.is_whole, changes.ids) == (False, None)
    assert [(one.id, one.done_bytes) for one in changes.jobs] == [("b", 5)]
    assert queue.asked == ["b"]
    # What was touched and is the same is no change.
    queue.feed.touch_all()
    assert (await queue.next()).jobs == ()


async def test_new_jobs_removed_ones_and_another_order_are_told(queue: Queue) -> None:
    queue.views["d"] = job_view("d")
    changes = await queue.next()
    assert (changes.ids, [one.id for one in changes.jobs]) == (("a", "b", "c", "d"), ["d"])
    del queue.views["a"]
    assert (await queue.next()).ids == ("b", "c", "d")
    queue.views = {one: queue.views[one] for one in ("d", "b", "c")}
    changes = await queue.next()
    assert (changes.ids, changes.jobs) == (("d", "b", "c"), ())


async def test_a_wait_ends_with_a_change_and_several_may_wait(queue: Queue) -> None:
    waits = [asyncio.ensure_future(queue.feed.wait(queue.version, 30)) for _ in range(2)]
    await asyncio.sleep(0)
    queue.feed.touch("a")
    await asyncio.sleep(0.01)
    assert not any(one.done() for one in waits)
    queue.set("a", 7)
    found = await asyncio.wait_for(asyncio.gather(*waits), 5)
    assert [[one.done_bytes for one in changes.jobs] for changes in found] == [[7], [7]]


async def test_a_new_process_tells_everything_to_those_who_knew_the_old_one(queue: Queue) -> None:
    queue.set("a", 9)
    await queue.next()
    queue.feed = queue.new_feed()
    changes = await queue.next(limit_s=30)
    assert changes.is_whole
    assert [one.done_bytes for one in changes.jobs] == [9, 0, 0]
