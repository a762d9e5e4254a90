"""Rate limits per API key or address: requests and tokens per minute, and the headers that tell.

Token buckets: each refills continuously up to a minute's worth.  What a request used in tokens is
known when it ends, so a bucket may fall below zero; the next request then waits for that debt,
which the windows of the `limits` library cannot express.
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import ImpetusError, RateLimited
from core.metrics import Metrics, TokenCount, count_tokens_of_this_request
from core.settings import Settings
from router.http.access import Access, access_of, caller_of
from router.http.errors import is_anthropic
from router.http.guards import Guard

MAX_CALLERS = 10_000
_MINUTE_S = 60.0


class Bucket:
    """What one caller may still use of one limit, in units per minute."""

    __slots__ = ("_at", "_level", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """Return what is left; below zero after more was used than there was."""
        elapsed = max(now - self._at, 0.0)
        self._level = min(self._level + elapsed * self.limit / _MINUTE_S, float(self.limit))
        self._at = max(now, self._at)
        return self._level

    def use(self, amount: float, now: float) -> None:
        """Take `amount` away, whether or not it is there."""
        self._level = self.level(now) - amount

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` is there; at most that of a full bucket."""
        missing = min(amount, self.limit) - self.level(now)
        return max(missing, 0.0) * _MINUTE_S / self.limit


@dataclass(slots=True)
class _Caller:
    """The buckets of one key or address, by the kind that headers name; of set limits only."""

    buckets: dict[str, Bucket]

    def is_full(self, now: float) -> bool:
        return all(bucket.level(now) >= bucket.limit for bucket in self.buckets.values())


class RateLimits:
    """Buckets of all callers; at most 10,000, of which those used longest ago are forgotten."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        limits = {"requests": requests, "tokens": tokens}
        self._limits = {kind: limit for kind, limit in limits.items() if limit is not None}
        self._callers: OrderedDict[str, _Caller] = OrderedDict()

    def buckets_of(self, caller: str, now: float) -> Mapping[str, Bucket]:
        """Return the buckets of a key or address."""
        found = self._callers.get(caller)
        if found is None:
            if len(self._callers) >= MAX_CALLERS:
                self._forget(now)
            found = _Caller({kind: Bucket(limit, now) for kind, limit in self._limits.items()})
            self._callers[caller] = found
        self._callers.move_to_end(caller)
        return found.buckets

    def _forget(self, now: float) -> None:
        """Drop a caller whose buckets are full, which loses nothing, else the oldest one."""
        oldest = next(iter(self._callers))
        for name in list(islice(self._callers, 10)):
            if self._callers[name].is_full(now):
                oldest = name
                break
        del self._callers[oldest]


class RateGuard(Guard):
    """Refuses inference requests of callers that are over a limit; installed if one is set."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(app, settings, metrics)
        self._clock = clock
        self._limits = RateLimits(settings.rate_limit_requests, settings.rate_limit_tokens)

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 429, or pass on and charge the tokens of the answer at its end."""
        method = scope["method"]
        if method != "POST" or access_of(method, scope["path"]) is not Access.INFERENCE:
            await self._app(scope, receive, send)
            return
        buckets = self._limits.buckets_of(_identity(scope), self._clock())
        error = self._refusal(buckets)
        if error is None and (requests := buckets.get("requests")) is not None:
            requests.use(1, self._clock())
        shown = self._headers(buckets, is_anthropic=is_anthropic(scope))
        if error is not None:
            await self.refusal(error, headers=shown)(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(shown)
            await send(message)

        tokens = buckets.get("tokens")
        if tokens is None:
            await self._app(scope, receive, send_with_limits)
            return
        with count_tokens_of_this_request() as count:
            try:
                await self._app(scope, receive, send_with_limits)
            finally:
                self._charge(tokens, count)

    def _charge(self, bucket: Bucket, count: TokenCount) -> None:
        bucket.use(count.tokens, self._clock())

    def _refusal(self, buckets: Mapping[str, Bucket]) -> ImpetusError | None:
        now = self._clock()
        for kind, bucket in buckets.items():
            if (wait_s := bucket.wait_s(1, now)) > 0:
                seconds = math.ceil(wait_s)
                return RateLimited(
                    f"The limit of {bucket.limit} {kind} per minute is reached; send the request "
                    f"again in {seconds} s. IMPETUS_RATE_LIMIT_{kind.upper()} sets the limit.",
                    retry_after_s=seconds,
                )
        return None

    def _headers(self, buckets: Mapping[str, Bucket], *, is_anthropic: bool) -> dict[str, str]:
        """Return the headers in the form of OpenAI's API, or of Anthropic's.

        Source: their pages "Rate limits in headers" and "Rate limits, Response headers".
        """
        now = self._clock()
        headers: dict[str, str] = {}
        for kind, bucket in buckets.items():
            left = max(int(bucket.level(now)), 0)
            full_in_s = bucket.wait_s(bucket.limit, now)
            if is_anthropic:
                at = datetime.fromtimestamp(time.time() + full_in_s, UTC)
                prefix = f"anthropic-ratelimit-{kind}"
                headers[f"{prefix}-limit"] = str(bucket.limit)
                headers[f"{prefix}-remaining"] = str(left)
                headers[f"{prefix}-reset"] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
            else:
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(left)
                headers[f"x-ratelimit-reset-{kind}"] = _duration(full_in_s)
        return headers


def _identity(scope: Scope) -> str:
    """Return who is limited: a stored key, else an address, of IPv6 its network of 64 bits."""
    if (key_id := caller_of(scope)) is not None:
        return f"key {key_id}"
    client = scope.get("client")
    address = str(client[0]).partition("%")[0] if client else ""
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))


def _duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: `120ms`, `7s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
