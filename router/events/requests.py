"""Follows inference requests from the resolved model to the end of the answer."""

from collections.abc import Callable, Sequence
from typing import Protocol

from core.metrics import TokenCount
from router.events.messages import Event, RequestFinishedEvent, RequestStartedEvent, RunningRequest


class _Publish(Protocol):
    def __call__(self, event: Event) -> None: ...


class RequestLog:
    """The requests that run, without their contents; each costs two calls, and none a token."""

    def __init__(self, publish: _Publish, clock: Callable[[], float]) -> None:
        self._publish = publish
        self._clock = clock
        self._running: dict[str, RunningRequest] = {}

    def running(self) -> Sequence[RunningRequest]:
        """Return the requests that are being answered, oldest first."""
        return list(self._running.values())

    def start(self, request_id: str, endpoint: str, model_id: str) -> None:
        """Note that a request's model is known."""
        if request_id in self._running:
            return
        request = self._running[request_id] = RunningRequest(
            request_id=request_id, endpoint=endpoint, model=model_id, started_at=self._clock()
        )
        self._publish(RequestStartedEvent(at=request.started_at, request=request))

    def finish(self, request_id: str, status: int, duration_s: float, count: TokenCount) -> None:
        """Note the end of a request; does nothing for one that never started."""
        request = self._running.pop(request_id, None)
        if request is None:
            return
        speed = None
        if count.completion_tokens and count.decode_s > 0:
            speed = round(count.completion_tokens / count.decode_s, 2)
        first_s = count.first_token_s
        self._publish(
            RequestFinishedEvent(
                at=self._clock(),
                request=request,
                status=status,
                duration_ms=round(duration_s * 1000, 3),
                prompt_tokens=count.prompt_tokens,
                cached_tokens=count.cached_tokens,
                completion_tokens=count.completion_tokens,
                first_token_ms=None if first_s is None else round(first_s * 1000, 3),
                tokens_per_s=speed,
            )
        )
