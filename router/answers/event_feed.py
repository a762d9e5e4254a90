"""The events of a request's generations beside its connection: whichever speaks first is heard."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TypeAlias, TypeVar

from starlette.types import Receive

from core.errors import EngineFailed
from core.types import Finished, GenerationEvent
from router.services import EventTaker

_logger = logging.getLogger(__name__)

TaggedEvent: TypeAlias = tuple[int, GenerationEvent]
Result = TypeVar("Result")

_MOST_UNREAD_EVENTS = 8192

Run: TypeAlias = Callable[[EventTaker], Awaitable[None]]
Shortcut: TypeAlias = Callable[[Sequence[TaggedEvent]], bool]


class EventFeed:
    """Runs generations concurrently and hands out what they said since the last look.

    Use as `async with`: leaving it, for whatever reason, cancels every generation that has not
    said its last event, and waits until all have ended.  A reader that falls 8,192 events behind
    loses its request.
    """

    def __init__(self, generations: Sequence[Run], receive: Receive) -> None:
        self._generations = generations
        self._receive = receive
        self._events: list[TaggedEvent] = []
        self._unfinished = set(range(len(generations)))
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._runs: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None
        # Says events at once while nobody else does; False leaves them to `next`.
        self.shortcut: Shortcut | None = None
        self.is_disconnected = False

    async def __aenter__(self) -> "EventFeed":
        self._runs = [
            asyncio.create_task(self._run(index, run))
            for index, run in enumerate(self._generations)
        ]
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace
        watchers = [self._watcher] if self._watcher else []
        # One that has said all has its own end to see to, and nothing to wait for.
        speaking = [self._runs[index] for index in self._unfinished]
        for task in (*speaking, *watchers):
            task.cancel()
        for result in await asyncio.gather(*self._runs, *watchers, return_exceptions=True):
            if isinstance(result, Exception):
                _logger.error("a generation did not end cleanly", exc_info=result)

    async def next(self) -> list[TaggedEvent] | None:
        """Return the events since the last call, as (choice index, event).

        An empty list means that `wake` was called; None that all is said, or that the client
        left (`is_disconnected`).  Raises what a generation raised, after its events.
        """
        if not (self._events or self._error or self.is_disconnected) and self._unfinished:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.is_disconnected:
            return None
        if self._events:
            events, self._events = self._events, []
            return events
        if self._error is not None:
            raise self._error
        return [] if self._unfinished else None

    @property
    def has_ended(self) -> bool:
        """Whether `next` would say at once that all is said."""
        return not (self._unfinished or self._events or self._error)

    def wake(self) -> None:
        """Make a waiting `next` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self, error: Exception) -> None:
        """Cancel the generations at once; `next` raises `error`."""
        self._error = self._error or error
        for run in self._runs:
            run.cancel()
        self.wake()

    async def _run(self, index: int, run: Run) -> None:
        try:
            await run(partial(self._take, index))
            if index in self._unfinished:
                raise EngineFailed("The engine ended the generation without a result.")
        except Exception as error:
            if index not in self._unfinished:
                _logger.exception("a generation failed after its end")
                return
            self._error = self._error or error
            self.wake()

    def _take(self, index: int, events: Sequence[GenerationEvent]) -> None:
        if self._is_awaited and self._has_been_said(index, events):
            return
        for event in events:
            if isinstance(event, Finished):
                if event.reason == "cancelled":
                    self.abort(EngineFailed("The generation was cancelled by the server."))
                    return
                self._unfinished.discard(index)
            self._events.append((index, event))
        if len(self._events) > _MOST_UNREAD_EVENTS:
            self.abort(EngineFailed("The client reads too slowly; the request was cancelled."))
        self.wake()

    @property
    def _is_awaited(self) -> bool:
        """Whether `next` waits for the next event, so that nothing can be overtaken."""
        is_waiting = self._waiter is not None and not self._waiter.done()
        return is_waiting and not self._events

    def _has_been_said(self, index: int, events: Sequence[GenerationEvent]) -> bool:
        """Try the shortcut, but for the last events, which `next` has to return."""
        if self.shortcut is None or not events or isinstance(events[-1], Finished):
            return False
        try:
            return self.shortcut([(index, event) for event in events])
        except Exception as error:
            self.abort(error)
            return True

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_disconnected = True
        self.wake()


async def unless_disconnected(work: Awaitable[Result], receive: Receive) -> Result | None:
    """Return the work's result, or None after cancelling it because the client left."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(watch())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
