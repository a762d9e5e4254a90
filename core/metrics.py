"""Prometheus metrics of requests and answers: names, units and labels."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from core.types import CacheOutcome, Timing, Usage

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_WAIT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_REQUEST_BUCKETS_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600, 1800)
# Observations that are kept until they are taken.
_KEPT_FIRST_TOKENS = 4096
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


@dataclass(slots=True)
class TokenCount:
    """Tokens of one request, and its times in seconds; of several choices the longest decoding.

    `first_token_s` is None before the first token.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    decode_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens."""
        return self.prompt_tokens + self.completion_tokens


_count_of_request: ContextVar[TokenCount | None] = ContextVar("tokens of request", default=None)


@contextmanager
def count_tokens_of_this_request() -> Iterator[TokenCount]:
    """Give what `Metrics` counts in this task and those it starts; inside of another, its count."""
    count = _count_of_request.get() or TokenCount()
    token = _count_of_request.set(count)
    try:
        yield count
    finally:
        _count_of_request.reset(token)


class Metrics:
    """The metrics of one application, in their own registry.

    Label values come from closed sets only: route templates, catalog ids, status and error codes.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._first_tokens_s: deque[float] = deque(maxlen=_KEPT_FIRST_TOKENS)
        self.requests = Counter(
            "impetus_requests",
            "HTTP requests by route, model and status.",
            ["endpoint", "model", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "impetus_in_flight_requests", "HTTP requests being answered.", registry=self.registry
        )
        self.errors = Counter(
            "impetus_errors", "Errors sent, by code.", ["code"], registry=self.registry
        )
        self.ignored_parameters = Counter(
            "impetus_ignored_parameters",
            "Unknown request fields that were ignored.",
            registry=self.registry,
        )
        self.request_duration = self._histogram(
            "impetus_request_duration_seconds",
            "Seconds from the request's headers to the end of its answer.",
            "endpoint",
            _REQUEST_BUCKETS_S,
        )
        self.time_to_first_token = self._histogram(
            "impetus_time_to_first_token_seconds",
            "Seconds from the start of a generation to its first token.",
            "model",
            _WAIT_BUCKETS_S,
        )
        self.inter_token_latency = self._histogram(
            "impetus_inter_token_latency_seconds",
            "Mean seconds between two tokens of one generation.",
            "model",
            _TOKEN_BUCKETS_S,
        )
        self.tool_call_mismatches = Counter(
            "impetus_tool_call_mismatches",
            "Tool calls sent although they were invalid or incomplete, by kind.",
            ["model", "kind"],
            registry=self.registry,
        )
        self.prompt_tokens = self._tokens("prompt", "Prompt tokens.")
        self.cached_tokens = self._tokens("cached", "Prompt tokens reused instead of computed.")
        self.reused_prefixes = self._by_source(
            "impetus_reused_prefixes", "Prompts that reused a computed prefix, by source."
        )
        self.reused_tokens = self._by_source(
            "impetus_reused_prefix_tokens",
            "Prompt tokens reused from a computed prefix, by source.",
        )
        self.completion_tokens = self._tokens("completion", "Generated tokens.")
        self.resumptions = Counter(
            "impetus_resumptions",
            "Answers resumed on another engine after one was lost.",
            ["model"],
            registry=self.registry,
        )
        self.request_throttled = Counter(
            "impetus_request_throttled_seconds",
            "Seconds that finished requests lost to throttling.",
            ["model"],
            registry=self.registry,
        )

    def _histogram(
        self, name: str, help_text: str, label: str, buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(name, help_text, [label], buckets=buckets, registry=self.registry)

    def _tokens(self, kind: str, help_text: str) -> Counter:
        return Counter(f"impetus_{kind}_tokens", help_text, ["model"], registry=self.registry)

    def _by_source(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, ["model", "source"], registry=self.registry)

    def count_reuse(self, model_id: str, cache: CacheOutcome) -> None:
        """Count the tokens that a finished request reused from KV cells, RAM and disk."""
        sources = {
            "cells": cache.cells_tokens, "ram": cache.ram_tokens, "disk": cache.disk_tokens,
        }  # fmt: skip
        for source, tokens in sources.items():
            if tokens:
                self.reused_prefixes.labels(model_id, source).inc()
                self.reused_tokens.labels(model_id, source).inc(tokens)

    def count_usage(self, model_id: str, usage: Usage) -> None:
        """Count a finished request's tokens, also for the limit of its caller."""
        if (count := _count_of_request.get()) is not None:
            count.prompt_tokens += usage.prompt_tokens
            count.cached_tokens += usage.cached_tokens
            count.completion_tokens += usage.completion_tokens
        self.prompt_tokens.labels(model_id).inc(usage.prompt_tokens)
        self.cached_tokens.labels(model_id).inc(usage.cached_tokens)
        self.completion_tokens.labels(model_id).inc(usage.completion_tokens)

    def observe_first_token(self, model_id: str, seconds: float) -> None:
        """Observe the time from the start of a generation to its first token."""
        self.time_to_first_token.labels(model_id).observe(seconds)
        self._first_tokens_s.append(seconds)
        if (count := _count_of_request.get()) is not None:
            count.first_token_s = seconds

    def take_first_tokens(self) -> Sequence[float]:
        """Return the last observed times to first tokens, each once, in seconds; at most 4,096."""
        taken = tuple(self._first_tokens_s)
        self._first_tokens_s.clear()
        return taken

    def count_timing(self, model_id: str, timing: Timing) -> None:
        """Count a finished request's throttled seconds, resumptions and time of decoding."""
        if (count := _count_of_request.get()) is not None:
            count.decode_s = max(count.decode_s, timing.decode_s)
        if timing.resumed:
            self.resumptions.labels(model_id).inc(timing.resumed)
        if timing.throttled_s:
            self.request_throttled.labels(model_id).inc(timing.throttled_s)

    def render(self) -> bytes:
        """Return all metrics in Prometheus text format, `CONTENT_TYPE`."""
        return generate_latest(self.registry)
