"""Rate limits: buckets, who shares one, what is charged, and the headers that clients read."""

import re
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.errors import RequestError
from core.metrics import Metrics
from core.settings import Settings, load_settings
from core.types import Usage
from deployments.router.credentials import StoredCredentials
from router.app import create_app
from router.http import rate_limits
from router.http.rate_limits import Bucket, RateGuard, RateLimits
from tests.clock import Clock
from tests.fakes import CHAT_MODEL, EMBEDDING_MODEL, FakeDispatcher, make_services
from tests.live_server import client_of

CHAT = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}
MESSAGE = {**CHAT, "max_tokens": 5}


def test_a_bucket_refills_to_a_minute_and_its_debt_is_waited_for() -> None:
    bucket = Bucket(60, now=0.0)
    bucket.use(60, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.0)
    assert bucket.wait_s(1, 0.5) == pytest.approx(0.5)
    assert bucket.level(1.0) == pytest.approx(1.0)
    bucket.use(121, 1.0)
    assert bucket.level(1.0) == pytest.approx(-120.0)
    assert bucket.wait_s(1, 1.0) == pytest.approx(121.0)
    assert bucket.level(10_000.0) == 60.0
    # A clock that goes back gives nothing twice.
    bucket.use(60, 10_000.0)
    assert bucket.level(9_000.0) == 0.0
    assert bucket.level(10_000.0) == 0.0


def test_callers_are_forgotten_beyond_the_bound_full_ones_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rate_limits, "MAX_CALLERS", 3)
    limits = RateLimits(60, None)
    for name in ("used", "full", "third"):
        limits.buckets_of(name, 0.0)
    limits.buckets_of("used", 0.0)["requests"].use(30, 0.0)
    limits.buckets_of("third", 0.0)["requests"].use(30, 0.0)
    limits._callers.move_to_end("used", last=False)
    limits.buckets_of("new", 0.0)["requests"].use(1, 0.0)
    assert list(limits._callers) == ["used", "third", "new"]
    limits.buckets_of("newer", 0.0)
    assert list(limits._callers) == ["third", "new", "newer"]


async def test_a_flood_of_callers_is_forgotten_and_the_limits_still_hold_n19(clock: Clock) -> None:
    """100,000 keys and addresses: bounded memory, and the one over its limit gets 429."""
    metrics = Metrics()
    guard = RateGuard(Inner(metrics), Settings(rate_limit_requests=2), metrics, clock)
    limits = guard._limits
    for number in range(100_000):
        limits.buckets_of(f"address {number}", clock.now)["requests"].use(1, clock.now)
    assert len(limits._callers) == rate_limits.MAX_CALLERS
    assert sys.getsizeof(limits._callers) < 4_000_000
    transport = httpx.ASGITransport(guard, client=("10.0.0.9", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answers = [await http.post("/v1/chat/completions") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["retry-after"] == "30"
    assert len(limits._callers) == rate_limits.MAX_CALLERS


class Inner:
    """An application that uses tokens."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.tokens = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        self.metrics.count_usage(CHAT_MODEL, Usage(self.tokens, 0))
        await send({"type": "http.response.body"})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ask(clock: Clock) -> Callable[..., Any]:
    """Send a request from an address through a guard; return status and headers."""
    guards: dict[str, tuple[RateGuard, Inner]] = {}

    async def send_one(
        path: str = "/v1/chat/completions",
        *,
        method: str = "POST",
        address: str = "10.0.0.1",
        tokens: int = 0,
        **limits: Any,
    ) -> httpx.Response:
        if str(limits) not in guards:
            metrics = Metrics()
            inner = Inner(metrics)
            guards[str(limits)] = RateGuard(inner, Settings(**limits), metrics, clock), inner
        guard, inner = guards[str(limits)]
        inner.tokens = tokens
        transport = httpx.ASGITransport(guard, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path)

    return send_one


async def test_requests_over_the_limit_wait_until_one_is_there(
    ask: Callable[..., Any], clock: Clock
) -> None:
    limits = {"rate_limit_requests": 2}
    answers = [await ask(**limits) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert left == ["1", "0", "0"]
    resets = [answer.headers["x-ratelimit-reset-requests"] for answer in answers]
    assert resets == ["30s", "1m0s", "1m0s"]
    assert answers[2].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[2].headers["retry-after"] == "30"
    error = answers[2].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "2 requests per minute" in error["message"]
    assert "x-ratelimit-limit-tokens" not in answers[2].headers
    clock.now += 29
    assert (await ask(**limits)).status_code == 429
    clock.now += 1
    assert (await ask(**limits)).status_code == 200
    # Refused requests have used nothing.
    assert (await ask(**limits)).status_code == 429


async def test_tokens_are_charged_when_the_answer_ends(
    ask: Callable[..., Any], clock: Clock
) -> None:
    limits = {"rate_limit_tokens": 600}
    first = await ask(tokens=1200, **limits)
    assert (first.status_code, first.headers["x-ratelimit-remaining-tokens"]) == (200, "600")
    refused = await ask(**limits)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "61")
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 61
    assert (await ask(**limits)).status_code == 200


async def test_addresses_are_limited_apart_and_networks_of_ipv6_together(
    ask: Callable[..., Any],
) -> None:
    limits = {"rate_limit_requests": 1}
    addresses = [
        *("10.0.0.1", "10.0.0.2", "::ffff:10.0.0.1", "2001:db8::1", "2001:db8::ffff"),
        *("2001:db8:0:1::1", "fe80::1%en0", "fe80::2%en1", "not:an:address"),
    ]
    found = [(await ask(address=address, **limits)).status_code for address in addresses]
    assert found == [200, 200, 429, 200, 429, 200, 200, 429, 200]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/api/drain"), ("GET", "/healthz")],
)
async def test_only_inference_is_limited(ask: Callable[..., Any], method: str, path: str) -> None:
    limits = {"rate_limit_requests": 1}
    for _ in range(3):
        answer = await ask(path, method=method, **limits)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if "ratelimit" in name]


async def test_anthropics_clients_get_their_own_headers(ask: Callable[..., Any]) -> None:
    limits = {"rate_limit_requests": 1, "rate_limit_tokens": 100}
    answers = [await ask("/v1/messages", **limits) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    for kind, limit in (("requests", "1"), ("tokens", "100")):
        prefix = f"anthropic-ratelimit-{kind}"
        assert answers[1].headers[f"{prefix}-limit"] == limit
        assert f"{prefix}-remaining" in answers[1].headers
        reset = answers[1].headers[f"{prefix}-reset"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", reset)
    assert answers[1].json()["error"]["type"] == "rate_limit_error"
    assert "retry-after" in answers[1].headers


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("messages", MESSAGE)])
async def test_pages_of_allowed_origins_may_read_the_limits(path: str, body: Any) -> None:
    services = make_services(FakeDispatcher(), rate_limit_requests=2, rate_limit_tokens=100)
    async with client_of(create_app(services)) as client:
        headers = {"origin": "http://localhost:5173"}
        answer = await client.post(f"/v1/{path}", json=body, headers=headers)
    shown = answer.headers["access-control-expose-headers"].split(", ")
    sent = [name for name in answer.headers if "ratelimit" in name]
    assert len(sent) == 6
    assert set(sent) <= set(shown)


@pytest.fixture
async def credentials(tmp_path: Path) -> AsyncIterator[StoredCredentials]:
    stored = StoredCredentials(tmp_path / "keys.sqlite")
    yield stored
    stored.close()


async def test_each_key_has_limits_of_its_own_for_the_tokens_of_all_apis(
    credentials: StoredCredentials,
) -> None:
    services = make_services(FakeDispatcher(), rate_limit_tokens=60)
    app = create_app(replace(services, credentials=credentials))
    calls = [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/embeddings", {"model": EMBEDDING_MODEL, "input": "hello"}),
        ("/v1/responses", {"model": CHAT_MODEL, "input": "hi"}),
    ]
    left = "x-ratelimit-remaining-tokens"
    for number, (path, body) in enumerate(calls):
        _, text = await credentials.create_key(f"k{number}", ["inference"], None)
        async with client_of(app, authorization=f"Bearer {text}") as http:
            before = await http.post(path, json=body)
            assert (before.status_code, before.headers[left]) == (200, "60"), path
            after = await http.post(path, json=body)
            assert int(after.headers[left]) < 60, path


async def test_without_limits_no_header_is_sent_and_nothing_is_installed() -> None:
    app = create_app(make_services())
    assert "RateGuard" not in {getattr(one.cls, "__name__", "") for one in app.user_middleware}
    limited = create_app(make_services(rate_limit_requests=1))
    assert "RateGuard" in {getattr(one.cls, "__name__", "") for one in limited.user_middleware}
    async with client_of(app) as http:
        answer = await http.post("/v1/chat/completions", json=CHAT)
        assert not [name for name in answer.headers if "ratelimit" in name]
        answer = await http.post("/v1/messages", json=MESSAGE)
        assert not [name for name in answer.headers if "ratelimit" in name]


@pytest.mark.parametrize("name", ["rate_limit_requests", "rate_limit_tokens"])
@pytest.mark.parametrize("value", [0, -1, 10**12, "many"])
def test_an_impossible_limit_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        load_settings({name: value})
