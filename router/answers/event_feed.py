"""Merges the events of concurrent generations with client-disconnect detection."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TypeAlias, TypeVar

from starlette.types import Receive

from core.errors import EngineFailed
from core.types import Finished, GenerationEvent, GenerationRequest
from router.answers.valid_events import TaggedEvent, valid_events
from router.services import EventCallback

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_MAX_UNREAD_EVENTS = 8192

Generate: TypeAlias = Callable[[GenerationRequest, EventCallback], Awaitable[None]]
WriteNow: TypeAlias = Callable[[Sequence[TaggedEvent]], bool]


class EventFeed:
    """Runs generations concurrently and buffers their events for one reader.

    Use as `async with`: leaving it, for whatever reason, cancels every generation whose last event
    has not arrived, and waits until all have ended.  A reader that falls 8,192 events behind loses
    its request.
    """

    def __init__(
        self, generate: Generate, requests: Sequence[GenerationRequest], receive: Receive
    ) -> None:
        """`generate` runs a request, as `router.services.Dispatcher.generate` does."""
        self._generate = generate
        self._requests = requests
        self._receive = receive
        self._events: list[TaggedEvent] = []
        self._unfinished = set(range(len(requests)))
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._runs: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._is_closing = False
        # Writes events while the reader waits, without waking it; False leaves them to `next`.
        self.write_now: WriteNow | None = None
        self.is_disconnected = False

    async def __aenter__(self) -> "EventFeed":
        self._runs = [
            asyncio.create_task(self._run(index, request))
            for index, request in enumerate(self._requests)
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
        self._is_closing = True
        watchers = [self._watcher] if self._watcher else []
        # A finished generation returns by itself.
        unfinished = [self._runs[index] for index in self._unfinished]
        for task in (*unfinished, *watchers):
            task.cancel()
        for result in await asyncio.gather(*self._runs, *watchers, return_exceptions=True):
            if isinstance(result, Exception):
                _logger.error("a generation did not end cleanly", exc_info=result)

    async def next(self) -> list[TaggedEvent] | None:
        """Return the events since the last call, as (choice index, event).

        An empty list means that `wake` was called; None that all generations finished, or that the
        client disconnected (`is_disconnected`).  Raises what a generation raised, after its events.
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
        """Whether `next` would return None without waiting."""
        return not (self._unfinished or self._events or self._error)

    def wake(self) -> None:
        """Make a waiting `next` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self, error: Exception) -> None:
        """Cancel the generations at once; `next` raises `error`."""
        self._fail(error)
        for run in self._runs:
            run.cancel()

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self.wake()

    async def _run(self, index: int, request: GenerationRequest) -> None:
        try:
            await self._generate(request, partial(self._on_events, index))
            if index in self._unfinished:
                raise EngineFailed(
                    "The engine ended the generation without a result; send it again."
                )
        except asyncio.CancelledError:
            if not self._is_closing:
                # Cancelled from within: the reader must not wait for an end that never comes.
                self._fail(EngineFailed("The server cancelled the generation; send it again."))
            raise
        except Exception as error:
            if index not in self._unfinished:
                _logger.exception("a generation failed after its end")
                return
            self._fail(error)

    def _on_events(self, index: int, events: Sequence[GenerationEvent]) -> None:
        if index not in self._unfinished:
            # Nothing follows a generation's end.
            return
        try:
            tagged = valid_events(index, events)
        except Exception as error:
            self.abort(error)
            return
        # Only while `next` waits and nothing is buffered: events must not overtake each other.
        is_next = self._waiter is not None and not self._waiter.done() and not self._events
        write_now = self.write_now if is_next and tagged else None
        if write_now is not None and not isinstance(tagged[-1][1], Finished):
            try:
                if write_now(tagged):
                    return
            except Exception as error:
                self.abort(error)
                return
        # One large batch, as of many calls at once, is no slowness.
        is_behind = len(self._events) >= _MAX_UNREAD_EVENTS
        last = tagged[-1][1] if tagged else None
        if isinstance(last, Finished):
            if last.reason == "cancelled":
                self.abort(EngineFailed("The server cancelled the generation; send it again."))
                return
            self._unfinished.discard(index)
        self._events += tagged
        if is_behind:
            limit = f"{_MAX_UNREAD_EVENTS:,}"
            self.abort(
                EngineFailed(
                    f"The client reads too slowly: over {limit} events were unread, so the request "
                    "was cancelled."
                )
            )
        self.wake()

    async def _watch(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except Exception:
            # A server that cannot tell any more is as good as gone.
            _logger.exception("cannot watch a client's connection")
        self.is_disconnected = True
        self.wake()


async def unless_disconnected(work: Awaitable[Result], receive: Receive) -> Result | None:
    """Return the result of `work`, or None after cancelling it because the client disconnected."""

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
