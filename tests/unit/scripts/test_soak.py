"""The soak test judges outcomes, growth and gaps; its requests are what their statuses say."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from core.units import MIB
from scripts.soak_lib import clients as clients_module
from scripts.soak_lib.clients import Outcome, Pause, run_client
from scripts.soak_lib.gaps import gap_of
from scripts.soak_lib.kills import Kill, kinds
from scripts.soak_lib.requests import PATHOLOGICAL, Sent, next_request
from scripts.soak_lib.samples import Sample, trends
from scripts.soak_lib.server import Metrics, SoakError
from scripts.soak_lib.verdict import Accounts, is_explained, judge

RIGHT = Outcome("stream", frozenset({200}), 10.0, 12.0, 200)
FINE = Accounts({"m": 90.0}, {"m": 80.0}, 100.0)
SAMPLE = Sample(0.0, 1000 * MIB, 500, 300, 20, 50, 10 * MIB, 80)


def faults(*outcomes: Outcome, kills: tuple[Kill, ...] = (), accounts: Accounts = FINE) -> int:
    return len(judge(outcomes, kills, [], accounts).faults)


def test_a_run_without_faults_passes() -> None:
    assert faults(RIGHT, replace(RIGHT, status=429, code="queue_full")) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        replace(RIGHT, status=500, code="internal_error"),
        replace(RIGHT, status=503, code="engine_failed"),
        replace(RIGHT, code="engine_failed"),
        replace(RIGHT, has_ended=False),
        replace(RIGHT, status=0, has_ended=False),
        replace(RIGHT, right=frozenset({413})),
    ],
)
def test_what_nothing_explains_is_a_fault(wrong: Outcome) -> None:
    assert faults(RIGHT, wrong) == 1
    # A process that died during the request explains it; one that died much later does not.
    assert faults(wrong, kills=(Kill("router", 11.0, 3.0),)) == 0
    assert faults(wrong, kills=(Kill("router", 20.0, 3.0),)) == 1
    assert faults(wrong, kills=(Kill("router", 1.0, 3.0),)) == 1


def test_a_request_of_the_time_of_recovery_is_explained() -> None:
    wrong = replace(RIGHT, status=503, code="unavailable")
    assert is_explained(wrong, [Kill("GCS", 5.0, 6.0)])
    assert is_explained(wrong, [Kill("GCS", 5.0, None)])


def test_kills_that_leave_something_are_faults() -> None:
    assert faults(kills=(Kill("router", 0.0, 2.0), Kill("raylet", 9.0, 20.0))) == 0
    assert faults(kills=(Kill("router", 0.0, None),)) == 1
    assert faults(kills=(Kill("raylet", 9.0, 20.0, left=2),)) == 1


def test_the_ledger_is_compared_with_the_processes() -> None:
    assert faults(accounts=Accounts({"m": 120.0}, {"m": 80.0}, 100.0)) == 1
    assert faults(accounts=Accounts({"m": 50.0}, {}, 100.0)) == 1
    assert faults(accounts=Accounts({}, {"m": 50.0}, 100.0)) == 1


@pytest.mark.parametrize("name", ["memory_bytes", "descriptors", "threads", "tasks", "files"])
def test_growth_is_seen(name: str) -> None:
    start = getattr(SAMPLE, name)
    growing = [replace(SAMPLE, **{name: start + step * start // 4}) for step in range(12)]
    assert [one.name for one in trends(growing) if not one.is_flat] == [name]
    assert all(one.is_flat for one in trends([SAMPLE] * 12))
    assert all(one.is_flat for one in trends(growing[::-1]))


def test_too_few_samples_tell_nothing() -> None:
    assert trends([SAMPLE] * 5) == []


def test_gaps_count_from_the_other_request_on() -> None:
    steady = [float(number) for number in range(40)]
    gap = gap_of("deep", [*steady, 44.0, 45.0], 40, 45.0, 400)
    assert (gap.median_s, gap.longest_s, gap.ratio) == (1.0, 5.0, 5.0)
    # A stream that stops then is a gap up to the end.
    assert gap_of("deep", steady, 40, 99.0, 0).longest_s == 60.0
    with pytest.raises(SoakError):
        gap_of("deep", [1.0, 2.0], 0, 99.0, 0)


def test_kinds_of_processes_are_named() -> None:
    assert "raylet" in kinds([])
    assert kinds(["router"]) == ["router"]
    with pytest.raises(ValueError, match="unknown: routr"):
        kinds(["routr"])


def test_metrics_are_read_by_their_label() -> None:
    metrics = Metrics('a{model="x"} 1.0\na{model="y"} 2.0\nb 3.0\n')
    assert metrics.values("a") == {"x": 1.0, "y": 2.0}
    assert metrics.value("b") == 3.0


def test_requests_are_the_same_for_the_same_seed() -> None:
    def some(seed: int) -> list[Sent]:
        chance = random.Random(seed)
        return [next_request(chance, ["a", "b"]) for _ in range(60)]

    assert some(1) == some(1)
    assert some(1) != some(2)


def test_every_hostile_request_expects_a_refusal_but_half_a_surrogate_pair() -> None:
    for make in PATHOLOGICAL:
        sent = make(random.Random(1), "m")
        assert not sent.is_stream
        assert sent.right & ({200} if sent.kind == "surrogate" else {400, 404, 413})


def events(*data: str) -> bytes:
    return "".join(f"data: {one}\n\n" for one in data).encode()


def problem(code: str) -> str:
    return json.dumps({"error": {"message": "m", "code": code}})


async def sent(
    content: bytes, monkeypatch: pytest.MonkeyPatch, leaves_after: int | None = None
) -> Outcome:
    """Return the outcome of one streamed request that gets this body."""
    request = Sent("stream", "/v1/x", b"{}", is_stream=True, leaves_after=leaves_after)
    monkeypatch.setattr(clients_module, "next_request", lambda *_: request)

    async def body() -> AsyncIterator[bytes]:
        yield content

    answer = httpx.MockTransport(lambda _: httpx.Response(200, content=body()))
    real = httpx.AsyncClient

    def client(**options: object) -> httpx.AsyncClient:
        del options
        return real(base_url="http://127.0.0.1", transport=answer)

    monkeypatch.setattr(httpx, "AsyncClient", client)
    found: asyncio.Queue[Outcome] = asyncio.Queue()
    pause = Pause()
    pause.end()
    task = asyncio.create_task(run_client(0, "http://x", ["m"], pause, found.put_nowait, 1))
    try:
        return await asyncio.wait_for(found.get(), 20)
    finally:
        task.cancel()


@pytest.mark.parametrize(
    ("content", "is_right", "code"),
    [
        (events('{"choices": []}', "[DONE]"), True, ""),
        (events('{"type": "message_start"}', '{"type": "message_stop"}'), True, ""),
        (events('{"type": "response.completed", "response": {"error": null}}'), True, ""),
        (events('{"choices": []}'), False, ""),
        (events(problem("engine_failed"), "[DONE]"), False, "engine_failed"),
        (events(problem("engine_failed")), False, "engine_failed"),
        (b"", False, ""),
    ],
)
async def test_a_stream_is_right_with_an_end_and_without_an_error(
    content: bytes, is_right: bool, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = await sent(content, monkeypatch)
    assert (outcome.is_right, outcome.code) == (is_right, code)


async def test_a_client_that_leaves_needs_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = await sent(events(*["{}"] * 5), monkeypatch, leaves_after=3)
    assert outcome.is_right
