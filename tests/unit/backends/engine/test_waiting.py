"""Waiting requests start by class and age; the Retry-After estimate."""

import asyncio
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from backends.engine.batching import BatchingEngine
from backends.engine.slot_gate import SlotGate
from backends.engine.waiting import Pace, WaitingQueue
from core.types import BATCH_DELAY_S, Priority
from tests.requests import request, run
from tests.unit.backends.engine.test_batching import FakeStepper, open_engine, until


def waiting_request(submitted_at: float, priority: Priority = "interactive") -> Any:
    generation = SimpleNamespace(priority=priority)
    return SimpleNamespace(submitted_at=submitted_at, generation=generation)


def test_interactive_requests_go_first_and_batch_ones_age() -> None:
    batch = waiting_request(0, "batch")
    early, late = waiting_request(1), waiting_request(BATCH_DELAY_S + 1)
    queue = WaitingQueue()
    queue.extend([batch, early, late])
    assert [queue.popleft() for _ in range(len(queue))] == [early, batch, late]


def test_each_class_keeps_its_order_and_what_is_dropped_is_gone() -> None:
    requests = [
        waiting_request(number, "batch" if number % 2 else "interactive") for number in range(6)
    ]
    queue = WaitingQueue()
    queue.extend(requests)
    queue.discard(requests[0])
    queue.discard(requests[0])
    assert list(queue) == [requests[index] for index in (2, 4, 1, 3, 5)]
    queue.clear()
    with pytest.raises(IndexError):
        queue.popleft()


def _has_submitted(engine: BatchingEngine, count: int) -> bool:
    return len(engine._loop._inbox.submitted) == count


async def test_f9_a_batch_request_waits_behind_interactive_ones_in_the_engine() -> None:
    stepper = FakeStepper(max_sequences=1)
    engine = open_engine(stepper)
    ends: list[str] = []

    async def ask(name: str, priority: Priority) -> None:
        await run(engine, replace(request("a", max_tokens=1), priority=priority))
        ends.append(name)

    stepper.gate.clear()
    tasks = [asyncio.ensure_future(ask("running", "interactive"))]
    await until(stepper.stepping.is_set)
    for number, name in enumerate(["batch", "first", "second"]):
        priority: Priority = "batch" if name == "batch" else "interactive"
        tasks.append(asyncio.ensure_future(ask(name, priority)))
        await until(partial(_has_submitted, engine, number + 1))
    stepper.gate.set()
    await asyncio.gather(*tasks)
    assert ends == ["running", "first", "second", "batch"]
    await engine.close()


async def test_slots_go_to_interactive_requests_first_and_back_from_who_left() -> None:
    gate = SlotGate(1)
    order: list[str] = []

    async def use(name: str, priority: Priority) -> None:
        await gate.acquire(priority)
        order.append(name)
        gate.release()

    await gate.acquire("interactive")
    tasks = {
        name: asyncio.ensure_future(use(name, "batch" if name == "late" else "interactive"))
        for name in ("late", "leaves", "early")
    }
    await asyncio.sleep(0)
    tasks["leaves"].cancel()
    await asyncio.gather(tasks["leaves"], return_exceptions=True)
    gate.release()
    await asyncio.gather(tasks["late"], tasks["early"])
    assert order == ["early", "late"]


async def test_a_slot_given_to_who_left_meanwhile_goes_to_the_next() -> None:
    gate = SlotGate(1)
    await gate.acquire("interactive")
    first, second = (asyncio.ensure_future(gate.acquire("interactive")) for _ in range(2))
    await asyncio.sleep(0)
    gate.release()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.wait_for(second, 5)


def test_f9_the_advice_follows_how_long_requests_took() -> None:
    pace = Pace()
    assert pace.retry_after_s(16, 2) == 20
    for _ in range(50):
        pace.note(0.5)
    assert pace.retry_after_s(16, 2) == 3
    assert pace.retry_after_s(0, 8) == 1
    for _ in range(50):
        pace.note(1000.0)
    assert pace.retry_after_s(256, 1) == 120
