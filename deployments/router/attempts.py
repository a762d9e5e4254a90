"""One request's way over one engine or several: what its client got, and what that took."""

import time
from dataclasses import replace

from core.errors import ModelNotResident
from core.types import Finished, GenerationEvent, GenerationRequest, PrefillProgress, Timing
from deployments.messages import Residency


class RequestAttempts:
    """What is known of one request in the router; used from its one task."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._token_ids: list[int] = []
        self._events = 0
        # The waits, and the work of engines that were lost; the last engine tells its own.
        self._spent = Timing()
        self._began_at = 0.0
        self._first_at: float | None = None
        self.end: Finished | None = None

    def attempt(self, number: int) -> GenerationRequest:
        """Return the request for what is left of the answer, with an id of this attempt's own.

        Late events of an earlier attempt must not reach a later one.
        """
        request_id = f"{self._request.id}.{number}"
        if not self._events:
            return replace(self._request, id=request_id)
        generated = tuple(self._token_ids)
        return replace(self._request, id=request_id, generated=generated, echo_prompt=False)

    @property
    def has_begun(self) -> bool:
        """Whether the client got a part of the answer."""
        return self._events > 0

    @property
    def can_go_on(self) -> bool:
        """Whether tokens stand for all text that was sent; an echoed prompt needs none."""
        return bool(self._token_ids) or self._events <= int(self._request.echo_prompt)

    def note_wait(self, waited_s: float, residency: Residency) -> None:
        """Count a wait for the scheduler: the load, and before it the memory."""
        load_s = min(residency.load_s, waited_s)
        self._spent = replace(
            self._spent,
            queued_s=self._spent.queued_s + waited_s - load_s,
            load_s=self._spent.load_s + load_s,
            evicted=(*self._spent.evicted, *residency.evicted),
        )

    def begin(self) -> None:
        """Note that an engine is given the request now."""
        self._began_at = time.monotonic()
        self._first_at = None

    def note(self, event: GenerationEvent) -> GenerationEvent:
        """Take an event that goes to the client; return it, the last one with the whole timing."""
        if isinstance(event, Finished):
            self.end = replace(event, timing=self._whole(event.timing))
            return self.end
        if not isinstance(event, PrefillProgress):
            self._events += 1
            self._token_ids.extend(event.token_ids)
            if self._first_at is None:
                self._first_at = time.monotonic()
        return event

    def note_lost(self, problem: Exception) -> None:
        """Count the work of an engine that was lost; one without the model did none."""
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
        # The next engine may be lost before it is given anything.
        self._began_at, self._first_at = 0.0, None

    def _whole(self, last: Timing) -> Timing:
        spent = self._spent
        return replace(
            spent,
            queued_s=spent.queued_s + last.queued_s,
            prefill_s=spent.prefill_s + last.prefill_s,
            decode_s=spent.decode_s + last.decode_s,
            throttled_s=last.throttled_s,
        )
