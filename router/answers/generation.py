"""Runs a request's generations, streamed or not, and records their usage and timing."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from starlette.responses import Response
from starlette.types import Receive

from core.types import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    JsonValue,
    PrefillProgress,
    RequestGroup,
    Timing,
    Usage,
)
from router.answers.event_feed import EventFeed
from router.answers.timings import llama_timings
from router.context import RouteContext
from router.http.errors import CLIENT_CLOSED_REQUEST
from router.services import ModelView

_DESCRIPTION = " !#$&'()*+,-./:;<=>?@[]^_`{|}~"


@dataclass(slots=True)
class Generation:
    """One request's sequences: choice `i` is `requests[i]`, each prompt having `n` of them."""

    context: RouteContext
    view: ModelView
    requests: tuple[GenerationRequest, ...]
    n: int
    headers: Mapping[str, str]
    created_at: int = field(default_factory=lambda: int(time.time()))
    _usages: dict[int, Usage] = field(default_factory=dict)
    _timings: list[Timing] = field(default_factory=list)
    _started_at: float = field(default_factory=time.monotonic)
    _first_token_at: float | None = None

    def run(self, receive: Receive) -> EventFeed:
        """Return the event feed of all requests; entering it starts them."""
        requests = self.requests
        if len(requests) > 1:
            group = RequestGroup(requests[0].id, len(requests))
            requests = tuple(replace(request, group=group) for request in requests)
        return EventFeed(self.context.services.dispatcher.generate, requests, receive)

    @property
    def awaits_first_token(self) -> bool:
        """Whether no token has arrived yet."""
        return self._first_token_at is None

    def note_first_token(self) -> None:
        """Observe the time to the first token, at the first call."""
        if self._first_token_at is None:
            self._first_token_at = time.monotonic()
            self.context.metrics.observe_first_token(
                self.view.id, self._first_token_at - self._started_at
            )

    def note_finished(self, index: int, event: Finished) -> None:
        """Count a choice's tokens; a prompt that several choices share is counted once."""
        usage = event.usage
        metrics = self.context.metrics
        counted = usage if index % self.n == 0 else Usage(0, usage.completion_tokens)
        metrics.count_usage(self.view.id, counted)
        metrics.count_timing(self.view.id, event.timing)
        for kind in event.mismatches:
            metrics.tool_call_mismatches.labels(self.view.id, kind).inc()
        if event.cache is not None:
            metrics.count_reuse(self.view.id, event.cache)
        self._usages[index] = usage
        self._timings.append(event.timing)
        if self._first_token_at is not None and usage.completion_tokens > 1:
            decode_s = time.monotonic() - self._first_token_at
            metrics.inter_token_latency.labels(self.view.id).observe(
                decode_s / (usage.completion_tokens - 1)
            )

    def usage(self) -> CompletionUsage:
        """Return the sum over all choices, each prompt counted once."""
        usages = self._usages.values()
        prompts = self._prompts()
        prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(usage.cached_tokens for usage in prompts)
            ),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=sum(usage.reasoning_tokens for usage in usages)
            ),
        )

    def _prompts(self) -> list[Usage]:
        """Return the usage of the first choice of each prompt."""
        return [usage for index, usage in self._usages.items() if index % self.n == 0]

    @property
    def is_finished(self) -> bool:
        """Whether the last event of every choice was noted."""
        return len(self._usages) == len(self.requests)

    def llama_timings(self) -> dict[str, JsonValue]:
        """Return `timings` as llama.cpp's server gives them."""
        return llama_timings(self._prompts(), self._usages.values(), self._timings)

    def timing(self) -> dict[str, JsonValue]:
        """Return milliseconds per phase, evicted models, and how often the request was resumed.

        Of several choices, the longest of each phase; `throttled` is part of the other phases.
        """
        seconds = {
            "queued": max((timing.queued_s for timing in self._timings), default=0),
            "load": max((timing.load_s for timing in self._timings), default=0),
            "prefill": max((timing.prefill_s for timing in self._timings), default=0),
            "decode": max((timing.decode_s for timing in self._timings), default=0),
            "throttled": max((timing.throttled_s for timing in self._timings), default=0),
        }
        evicted = dict.fromkeys(name for timing in self._timings for name in timing.evicted)
        return {
            **{name: round(value * 1000, 3) for name, value in seconds.items()},
            "evicted": list(evicted),
            "resumed": max((timing.resumed for timing in self._timings), default=0),
        }

    def answer_headers(self) -> dict[str, str]:
        """Return the headers of the whole answer: `headers` and the timing.

        Source: W3C, Server Timing, for the syntax; what is not a duration is a description.
        """
        phases = []
        for name, value in self.timing().items():
            if isinstance(value, float | int) and name != "resumed":
                phases.append(f"{name};dur={value:.3f}")
            elif value:
                shown = ", ".join(map(str, value)) if isinstance(value, list) else value
                # A model's name may have any characters, a header may not.
                phases.append(f'{name};desc="{quote(str(shown), safe=_DESCRIPTION)}"')
        return {**self.headers, "x-impetus-timing": ", ".join(phases)}

    async def collect(self, receive: Receive) -> list[list[GenerationEvent]] | None:
        """Return every choice's events, or None if the client disconnected before the end."""
        choices: list[list[GenerationEvent]] = [[] for _ in self.requests]
        async with self.run(receive) as feed:
            while (batch := await feed.next()) is not None:
                for index, event in batch:
                    if isinstance(event, PrefillProgress) and not event.logprobs:
                        continue
                    self.note_first_token()
                    choices[index].append(event)
                    if isinstance(event, Finished):
                        self.note_finished(index, event)
            return None if feed.is_disconnected else choices


def client_closed_response() -> Response:
    """Return the response that is logged, not sent, when the client disconnected."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)
