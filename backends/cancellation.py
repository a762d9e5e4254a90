"""Lets long work on a thread stop when the request that it is done for is cancelled."""

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar


class Cancelled(Exception):
    """The request was cancelled; its work stops, and nobody sees this."""


_current: ContextVar[threading.Event | None] = ContextVar("cancellation", default=None)


@contextlib.contextmanager
def cancelled_by(event: threading.Event) -> Iterator[None]:
    """Let `check_cancelled` in the context raise as soon as `event` is set."""
    token = _current.set(event)
    try:
        yield
    finally:
        _current.reset(token)


def check_cancelled() -> None:
    """Raise Cancelled if the request that the caller works for was cancelled."""
    event = _current.get()
    if event is not None and event.is_set():
        raise Cancelled
