"""Measures how long an innocent stream pauses while a pathological request is handled."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context

import httpx

from scripts.soak_lib.requests import PATHOLOGICAL, Sent
from scripts.soak_lib.server import SoakError

MOST = 3.0
CONTROL = "nothing"
_FIRST_TOKENS = 5
_CALM_TOKENS = 40
_LATER_TOKENS = 10
_LIMIT_S = 120.0
_CONTROL_S = 3.0
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Gap:
    """Gaps between an innocent stream's events, in seconds.

    `median_s` before a request of this kind was sent; `longest_s` from then on until it was
    answered with `status`, 0 without an answer in time.
    """

    kind: str
    median_s: float
    longest_s: float
    status: int

    @property
    def ratio(self) -> float:
        """The longest gap in median steps."""
        return self.longest_s / self.median_s


def gap_of(kind: str, arrivals: Sequence[float], sent_at: int, until: float, status: int) -> Gap:
    """Return the gaps of a stream whose events arrived at `arrivals`.

    The other request was sent after `sent_at` of them; the wait for the next one lasted `until`
    (monotonic seconds).  Raises SoakError if too few arrived before it.
    """
    if sent_at <= _FIRST_TOKENS + 1:
        raise SoakError(f"The stream ended after {len(arrivals)} tokens, before “{kind}” was sent.")
    # The first gaps hold the stream's own start.
    calm = [after - before for before, after in pairwise(arrivals[_FIRST_TOKENS:sent_at])]
    later = [after - before for before, after in pairwise([*arrivals[sent_at - 1 :], until])]
    return Gap(kind, statistics.median(calm), max(later), status)


async def measure_gaps(url: str, model: str, seed: int) -> list[Gap]:
    """Run innocent streams, each beside one pathological request to the same model.

    Returns for each kind of request the median of three, by its ratio: other processes of the
    machine delay one now and then.  The first, of `CONTROL`, had nothing beside it.
    """
    chance = random.Random(seed)
    found: dict[str, list[Gap]] = {}
    for gap in await _measure_all(url, model, chance):
        found.setdefault(gap.kind, []).append(gap)
    return [sorted(each, key=lambda one: one.ratio)[len(each) // 2] for each in found.values()]


async def _measure_all(url: str, model: str, chance: random.Random) -> list[Gap]:
    kinds = [None, *PATHOLOGICAL] * _ROUNDS
    every = [None if make is None else make(chance, model) for make in kinds]
    # In this process, sending a large body would delay the reading of the stream.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_open_client, initargs=(url,)) as sender:
        # The process imports its modules now, not beside a stream.
        sender.submit(_rest, 0.0).result()
        async with httpx.AsyncClient(base_url=url, timeout=_LIMIT_S, trust_env=False) as client:
            return [await _measure(client, sender, sent, model) for sent in every]


async def _measure(
    client: httpx.AsyncClient, sender: ProcessPoolExecutor, sent: Sent | None, model: str
) -> Gap:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Write a long story."}],
        "max_tokens": 800,
        "stream": True,
        "temperature": 0,
        "logit_bias": {"2": -100, "0": -100},
    }
    arrivals: list[float] = []
    answer: asyncio.Future[int] | None = None
    sent_at = 0
    until = 0.0
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(_LIMIT_S):
            async for at in _arrivals(client, body):
                arrivals.append(at)
                if answer is None and len(arrivals) > _CALM_TOKENS:
                    sent_at = len(arrivals)
                    work = partial(_rest, _CONTROL_S) if sent is None else partial(_status, sent)
                    answer = asyncio.wrap_future(sender.submit(work))
                is_over = answer is not None and answer.done()
                if is_over and len(arrivals) > sent_at + _LATER_TOKENS:
                    until = at
                    break
    status = 0 if answer is None else await answer
    # A stream that ends or fails before the other request is answered waits until then.
    kind = CONTROL if sent is None else sent.kind
    return gap_of(kind, arrivals, sent_at, until or time.monotonic(), status)


async def _arrivals(client: httpx.AsyncClient, body: Mapping[str, object]) -> AsyncIterator[float]:
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                yield time.monotonic()


_client: httpx.Client | None = None


def _open_client(url: str) -> None:
    """Open the client of the sender's process: that alone takes some 30 ms of processor time."""
    global _client
    _client = httpx.Client(base_url=url, timeout=_LIMIT_S, trust_env=False)


def _rest(seconds: float) -> int:
    time.sleep(seconds)
    return 0


def _status(sent: Sent) -> int:
    """Return the answer's status, 0 without one in time; runs in the sender's process."""
    assert _client is not None
    headers = {"content-type": "application/json"}
    try:
        return _client.post(sent.path, content=sent.body, headers=headers).status_code
    except httpx.HTTPError:
        return 0
