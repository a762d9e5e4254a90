"""What an engine reports of its work, for a record that is read after the process has died."""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

# The request that the current task serves, for calls without an id: embeddings and token counts.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


class Activity(Protocol):
    """Records which requests one open model works on.  Thread-safe; never raises, never blocks.

    `step` is entered around each forward pass and costs less than a microsecond; the rest is
    called a few times per request.  Entries of a request end with the request at the latest.
    """

    step: AbstractContextManager[object]

    def working(self, *request_ids: str) -> AbstractContextManager[object]:
        """Enter while these requests are prepared, tokenized or embedded."""
        ...

    def begin_prefill(self, request_id: str) -> None:
        """Note a request whose prompt the next steps compute."""
        ...

    def end_prefill(self, request_id: str) -> None:
        """Note that a request has its first token; idempotent."""
        ...


class NoActivity:
    """Records nothing."""

    step: AbstractContextManager[object] = nullcontext()

    def working(self, *request_ids: str) -> AbstractContextManager[object]:
        """Record nothing."""
        del request_ids
        return self.step

    def begin_prefill(self, request_id: str) -> None:
        """Record nothing."""

    def end_prefill(self, request_id: str) -> None:
        """Record nothing."""


NO_ACTIVITY = NoActivity()


@runtime_checkable
class RecordsActivity(Protocol):
    """An engine that reports its work."""

    def record_activity(self, activity: Activity) -> None:
        """Report to `activity` from now on; call it before the first request."""
        ...
