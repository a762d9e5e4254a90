"""Keeps the last events of a run for replay; of progress only the newest of each subject."""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

KEPT_EVENTS = 1000
KEPT_BYTES = 8_000_000
KEPT_SUBJECTS = 2000
_ID = re.compile(r"([0-9a-z]{1,32})-([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event as it is sent: `text` is a whole server-sent event."""

    number: int
    text: str


class EventLog:
    """Numbered events of one run.

    An event with a `subject` replaces the older one of that subject: what changes several times a
    second takes no place of other events.
    """

    def __init__(self, run: str, *, kept: int = KEPT_EVENTS, kept_bytes: int = KEPT_BYTES) -> None:
        """`run` is of digits and small letters, and differs from that of every earlier log."""
        self._run = run
        self._kept = kept
        self._kept_bytes = kept_bytes
        self._events: deque[LoggedEvent] = deque()
        self._bytes = 0
        self._newest: dict[str, LoggedEvent] = {}
        self._last = 0
        # The highest number that was dropped without one that replaces it.
        self._dropped = 0

    @property
    def last(self) -> int:
        """The number of the last event; 0 before the first."""
        return self._last

    @property
    def last_id(self) -> str:
        """The id of the last event."""
        return self.id_of(self._last)

    def id_of(self, number: int) -> str:
        """Return the id of the event with this number."""
        return f"{self._run}-{number}"

    def number_of(self, event_id: str) -> int | None:
        """Return the number of an id of this run; None for any other text."""
        match = _ID.fullmatch(event_id)
        if match is None or match[1] != self._run or int(match[2]) > self._last:
            return None
        return int(match[2])

    def append(self, name: str, data: str, *, subject: str = "", ends: str = "") -> None:
        """Add an event of type `name`; `data` is a line of JSON.

        `ends` names a subject whose last event this one makes useless.
        """
        self._last += 1
        text = f"id: {self.id_of(self._last)}\nevent: {name}\ndata: {data}\n\n"
        event = LoggedEvent(self._last, text)
        if ends:
            self._newest.pop(ends, None)
        if subject:
            self._newest.pop(subject, None)
            self._newest[subject] = event
            if len(self._newest) > KEPT_SUBJECTS:
                self._drop(self._newest.pop(next(iter(self._newest))))
            return
        self._events.append(event)
        self._bytes += len(text)
        while len(self._events) > self._kept or self._bytes > self._kept_bytes:
            oldest = self._events.popleft()
            self._bytes -= len(oldest.text)
            self._drop(oldest)

    def _drop(self, event: LoggedEvent) -> None:
        self._dropped = max(self._dropped, event.number)

    def after(self, number: int, limit: int) -> Sequence[LoggedEvent] | None:
        """Return at most `limit` events after `number`, oldest first; None if some are dropped."""
        if number < self._dropped:
            return None
        found: list[LoggedEvent] = []
        for events in (reversed(self._events), reversed(self._newest.values())):
            for event in events:
                if event.number <= number:
                    break
                found.append(event)
        found.sort(key=lambda event: event.number)
        return found[:limit]
