"""Tracks one request across engine attempts: what was sent and how long it took."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from core.errors import ModelNotResident
from core.types import Finished, GenerationEvent, GenerationRequest, PrefillProgress, Timing
from deployments.messages import Residency
from router.services import EventCallback


class RequestAttempts:
    """Passes one request's events on and remembers what the next attempt needs to resume.

    Belongs to one event loop.
    """

    def __init__(
        self,
        request: GenerationRequest,
        on_events: EventCallback,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_events` gets the events of all attempts, as those of one.

        `on_answer` is called with the first event of each attempt that is part of the answer.
        """
        self._on_answer = on_answer
        self._request = request
        self._on_events = on_events
        self._token_ids: list[int] = []
        self._events = 0
        # Waits and the work of lost engines; the last engine reports its own.
        self._spent = Timing()
        self._began_at = 0.0
        self._first_at: float | None = None
        self._done: asyncio.Future[None] | None = None
        self.finished: Finished | None = None

    def remaining_request(self, request_id: str) -> GenerationRequest:
        """Return the request for the rest of the answer, with the id of the attempt."""
        if not self._events:
            return replace(self._request, id=request_id)
        generated = tuple(self._token_ids)
        return replace(self._request, id=request_id, generated=generated, echo_prompt=False)

    @property
    def has_begun(self) -> bool:
        """Whether the client received a part of the answer."""
        return self._events > 0

    @property
    def can_resume(self) -> bool:
        """Whether the token ids of all sent text are known; an echoed prompt has none."""
        return bool(self._token_ids) or self._events <= int(self._request.echo_prompt)

    def note_wait(self, waited_s: float, residency: Residency) -> None:
        """Count a wait for the scheduler: the load, and the wait for memory before it."""
        load_s = min(residency.load_s, waited_s)
        self._spent = replace(
            self._spent,
            queued_s=self._spent.queued_s + waited_s - load_s,
            load_s=self._spent.load_s + load_s,
            evicted=(*self._spent.evicted, *residency.evicted),
        )

    def begin(self, done: "asyncio.Future[None] | None" = None) -> None:
        """Start timing an engine's work; `done` is resolved by its last event."""
        self._done = done
        self._began_at = time.monotonic()
        self._first_at = None

    def on_events(self, events: Sequence[GenerationEvent]) -> None:
        """Pass an engine's events on; the last one gets the timing of all attempts."""
        self._on_events([self._note(event) for event in events])
        if self.finished is not None and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _note(self, event: GenerationEvent) -> GenerationEvent:
        if isinstance(event, Finished):
            self.finished = replace(event, timing=self._total(event.timing))
            return self.finished
        if not isinstance(event, PrefillProgress):
            self._events += 1
            self._token_ids.extend(event.token_ids)
            if self._first_at is None:
                self._first_at = time.monotonic()
                self._on_answer()
        return event

    def note_lost(self, problem: Exception) -> None:
        """Count the work of an engine that was lost; one that lacked the model did none."""
        if isinstance(problem, ModelNotResident) and not self._events:
            return
        now = time.monotonic()
        began_at = self._began_at or now
        first_at = self._first_at or now
        self._spent = replace(
            self._spent,
            prefill_s=self._spent.prefill_s + first_at - began_at,
            decode_s=self._spent.decode_s + now - first_at,
            resumed=self._spent.resumed + 1,
        )
        # The next engine may be lost before it receives the request.
        self._began_at, self._first_at = 0.0, None

    def _total(self, last: Timing) -> Timing:
        spent = self._spent
        return replace(
            spent,
            queued_s=spent.queued_s + last.queued_s,
            prefill_s=spent.prefill_s + last.prefill_s,
            decode_s=spent.decode_s + last.decode_s,
            throttled_s=last.throttled_s,
        )
