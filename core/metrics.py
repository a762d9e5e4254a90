"""Every prometheus metric of the server: names, units and labels in one place."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from core.types import CacheOutcome, Timing, Usage

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_WAIT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_REQUEST_BUCKETS_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600, 1800)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The metrics of one application, in a registry of its own.

    Labels take values from closed sets only: route templates, catalog ids, status and error codes.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
            "From the request's headers to the end of its answer.",
            "endpoint",
            _REQUEST_BUCKETS_S,
        )
        self.time_to_first_token = self._histogram(
            "impetus_time_to_first_token_seconds",
            "From the start of a generation to its first token.",
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
            "Tool calls that were passed on though something was wrong with them, by kind.",
            ["model", "kind"],
            registry=self.registry,
        )
        self.prompt_tokens = self._tokens("prompt", "Prompt tokens.")
        self.cached_tokens = self._tokens("cached", "Prompt tokens not computed again.")
        self.reused_prefixes = self._by_source(
            "impetus_reused_prefixes", "Prompts of which a part was found computed, by source."
        )
        self.reused_tokens = self._by_source(
            "impetus_reused_prefix_tokens", "Prompt tokens found computed, by source."
        )
        self.completion_tokens = self._tokens("completion", "Generated tokens.")
        self.resumptions = Counter(
            "impetus_resumptions",
            "Engines that were lost under answers which went on with another one.",
            ["model"],
            registry=self.registry,
        )
        self.request_throttled = Counter(
            "impetus_request_throttled_seconds",
            "Seconds that throttling cost finished requests.",
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
        """Add what a finished request found computed in KV cells, in RAM and on disk."""
        sources = {
            "cells": cache.cells_tokens, "ram": cache.ram_tokens, "disk": cache.disk_tokens,
        }  # fmt: skip
        for source, tokens in sources.items():
            if tokens:
                self.reused_prefixes.labels(model_id, source).inc()
                self.reused_tokens.labels(model_id, source).inc(tokens)

    def count_usage(self, model_id: str, usage: Usage) -> None:
        """Add a finished request's tokens to the model's counters."""
        self.prompt_tokens.labels(model_id).inc(usage.prompt_tokens)
        self.cached_tokens.labels(model_id).inc(usage.cached_tokens)
        self.completion_tokens.labels(model_id).inc(usage.completion_tokens)

    def count_timing(self, model_id: str, timing: Timing) -> None:
        """Add what a finished request lost to throttling and to engines that died."""
        if timing.resumed:
            self.resumptions.labels(model_id).inc(timing.resumed)
        if timing.throttled_s:
            self.request_throttled.labels(model_id).inc(timing.throttled_s)

    def render(self) -> bytes:
        """Return all metrics in prometheus' text format, `CONTENT_TYPE`."""
        return generate_latest(self.registry)
