"""Publishes events to the readers of `/api/events`, and follows their sources while there are any.

Readers have no queues: each reads the one log of events from its own place.  A slow one therefore
costs no memory, and is told to fetch the state again once the log no longer reaches back to it.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from core.errors import Unavailable
from router.events.log import EventLog
from router.events.messages import Event, MemoryView, ModelSummary, ResetEvent, ServerState
from router.events.messages import ResetReason as ResetReason
from router.events.messages import StrainView as StrainView
from router.events.requests import RequestLog
from router.job_service import JobView

MAX_READERS = 64
# How long events are kept for a reader that lost its connection.
LINGER_S = 120.0
# One write of a reader; what it has not read yet of it is all the memory that it costs.
_BATCH = 64
_BATCH_CHARACTERS = 64_000
_RETRY_S = 5


@dataclass(frozen=True, slots=True)
class KnownState:
    """What the sources know now; `missing` says by part why it is outdated or missing."""

    models: Sequence[ModelSummary] = ()
    jobs: Sequence[JobView] = ()
    memory: MemoryView | None = None
    thermal: StrainView | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


class Publish(Protocol):
    """Adds an event; see `EventLog.append` for `subject` and `ends`."""

    def __call__(self, event: Event, *, subject: str = "", ends: str = "") -> None:
        """Publish `event`."""


class EventSources(Protocol):
    """What events come from; follows nothing before `start` and after `stop`."""

    def start(self, publish: Publish) -> None:
        """Begin to follow the sources; each change since the first answer is published."""
        ...

    def stop(self) -> None:
        """Follow nothing, and forget what is known."""
        ...

    async def refresh(self) -> None:
        """Ask every source now, and publish what has changed; returns within seconds."""
        ...

    def known(self) -> KnownState:
        """Return what is known, which all published events led to; does not block."""
        ...


class EventHub:
    """The events of this process; belongs to one event loop.

    It is active from the first reader, or request for the state, until `linger_s` after the last.
    Each such time is a run with ids of its own.
    """

    def __init__(
        self,
        sources: EventSources,
        *,
        linger_s: float = LINGER_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sources = sources
        self._linger_s = linger_s
        self._clock = clock
        self._log: EventLog | None = None
        self._readers: set[EventReader] = set()
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.requests = RequestLog(self.publish, clock)

    @property
    def is_active(self) -> bool:
        """Whether events are kept."""
        return self._log is not None

    @property
    def is_closed(self) -> bool:
        """Whether readers have to end."""
        return self._is_closed

    def publish(self, event: Event, *, subject: str = "", ends: str = "") -> None:
        """Add an event if anybody may read it; does not block."""
        if self._log is None:
            return
        self._log.append(event.type, event.model_dump_json(), subject=subject, ends=ends)
        self.wake()

    def wake(self) -> None:
        """Make all readers look for events."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def state(self) -> ServerState:
        """Return the state of this moment with the id of the last event that led to it."""
        self._activate()
        try:
            await self._sources.refresh()
            # No await from here: the state and the id belong together.
            return self._known_state(self._activate())
        finally:
            self._linger()

    def _known_state(self, log: EventLog) -> ServerState:
        known = self._sources.known()
        return ServerState(
            event_id=log.last_id,
            at=self._clock(),
            models=tuple(known.models),
            jobs=tuple(known.jobs),
            memory=known.memory,
            thermal=known.thermal,
            requests=tuple(self.requests.running()),
            missing=dict(known.missing),
        )

    def reader(self, last_event_id: str) -> "EventReader":
        """Return a reader that goes on after an event; use it as a context manager.

        Raises Unavailable if there are too many.
        """
        if self._is_closed:
            raise Unavailable("The server is stopping.", retry_after_s=_RETRY_S)
        if len(self._readers) >= MAX_READERS:
            raise Unavailable(
                f"{MAX_READERS} event streams are open already; close some.",
                retry_after_s=_RETRY_S,
            )
        return EventReader(self, last_event_id)

    def close(self) -> None:
        """End all readers and follow nothing any more."""
        self._is_closed = True
        self.wake()
        self._deactivate()

    def enter(self, reader: "EventReader") -> EventLog:
        """Count a reader; return the log that it reads."""
        log = self._activate()
        self._readers.add(reader)
        return log

    def leave(self, reader: "EventReader") -> None:
        """Stop counting a reader."""
        self._readers.discard(reader)
        self._linger()

    async def wait(self, limit_s: float) -> None:
        """Return at the next event, or after `limit_s`."""
        # `wait_for` of Python 3.11 may lose a cancellation that comes with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._changed.wait()

    def reset_text(self, log: EventLog, reason: ResetReason) -> str:
        """Return an event that makes one reader fetch the state, with the id to go on from."""
        data = ResetEvent(at=self._clock(), reason=reason).model_dump_json()
        return f"id: {log.last_id}\nevent: reset\ndata: {data}\n\n"

    def _activate(self) -> EventLog:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._log is None:
            self._log = EventLog(f"{time.time_ns():x}{secrets.token_hex(4)}")
            if not self._is_closed:
                self._sources.start(self.publish)
        return self._log

    def _linger(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._readers and self._log is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._linger_s, self._deactivate)

    def _deactivate(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._log is not None:
            self._log = None
            self._sources.stop()


class EventReader:
    """One reader's place in the log; `with` counts it among the readers."""

    def __init__(self, hub: EventHub, last_event_id: str) -> None:
        self._hub = hub
        self._last_event_id = last_event_id
        self._at = 0
        self._reset: ResetReason | None = None
        self._log: EventLog | None = None

    def __enter__(self) -> "EventReader":
        log = self._log = self._hub.enter(self)
        number = log.number_of(self._last_event_id)
        if number is None:
            self._reset = "unknown_id" if self._last_event_id else "no_id"
        self._at = log.last if number is None else number
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace
        self._hub.leave(self)

    @property
    def has_ended(self) -> bool:
        """Whether no further event will come."""
        return self._hub.is_closed

    def take(self) -> str:
        """Return the next events as server-sent text; empty if there are none yet."""
        log = self._log
        assert log is not None
        events = None if self._reset else log.after(self._at, _BATCH)
        if events is None:
            reason, self._reset = self._reset or "too_old", None
            self._at = log.last
            return self._hub.reset_text(log, reason)
        taken: list[str] = []
        characters = 0
        for event in events:
            characters += len(event.text)
            if taken and characters > _BATCH_CHARACTERS:
                break
            taken.append(event.text)
            self._at = event.number
        return "".join(taken)

    async def wait(self, limit_s: float) -> None:
        """Return at the next event, or after `limit_s`."""
        await self._hub.wait(limit_s)
