"""Tells the router which jobs changed, and lets it wait for a change (long polling)."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from router.job_service import JobChanges, JobView


class JobFeed:
    """The views of all jobs with the number of their last change.  Belongs to one event loop.

    Nothing is computed while nobody asks.  `read` returns all jobs' ids in the order of the queue,
    `view` one job's view.
    """

    def __init__(self, read: Callable[[], Sequence[str]], view: Callable[[str], JobView]) -> None:
        self._read = read
        self._view = view
        # Based on the time, so that a restarted process repeats no number.
        self._number = self._first = time.time_ns()
        self._ids: tuple[str, ...] = ()
        self._ids_number = self._number
        self._views: dict[str, tuple[int, JobView]] = {}
        self._touched: set[str] = set()
        self._changed = asyncio.Event()

    def touch(self, job_id: str) -> None:
        """Note that a job may have changed."""
        # One that has no view yet is found by its id.
        if job_id in self._views:
            self._touched.add(job_id)
        self._changed.set()

    def touch_all(self) -> None:
        """Note that any job may have changed, as limits do with time."""
        self._touched.update(self._views)
        self._changed.set()

    async def wait(self, known: int, limit_s: float) -> JobChanges:
        """Return what changed after `known`, once something has, or after `limit_s`.

        A number of another run gets everything at once.
        """
        end = time.monotonic() + limit_s
        while True:
            changes = self._changes(known)
            left_s = end - time.monotonic()
            if changes.version != known or left_s <= 0:
                return changes
            self._changed.clear()
            # `wait_for` of Python 3.11 may lose a cancellation that comes with the change.
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    def _changes(self, known: int) -> JobChanges:
        self._look()
        is_whole = not self._first <= known <= self._number
        return JobChanges(
            version=self._number,
            is_whole=is_whole,
            jobs=tuple(view for number, view in self._views.values() if is_whole or number > known),
            ids=self._ids if is_whole or self._ids_number > known else None,
        )

    def _look(self) -> None:
        """Compare the jobs that were touched with their last views."""
        ids = tuple(self._read())
        if ids != self._ids:
            self._number += 1
            self._ids, self._ids_number = ids, self._number
            self._touched.update(one for one in ids if one not in self._views)
            self._views = {one: self._views[one] for one in ids if one in self._views}
        touched, self._touched = self._touched, set()
        # In the order of the queue, which a set has not.
        for job_id in ids if touched else ():
            if job_id not in touched:
                continue
            view = self._view(job_id)
            old = self._views.get(job_id)
            if old is None or old[1] != view:
                self._number += 1
                self._views[job_id] = (self._number, view)
