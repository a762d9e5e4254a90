"""Waiting requests start by class and age; the Retry-After estimate."""

import asyncio
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from backends.engine.batching import BatchingEngine
from backends.engine.slot_gate import SlotGate
from backends.engine.waiting import Admission, Pace, WaitingQueue
from core.errors import QueueFull
from core.types import BATCH_DELAY_S, GenerationRequest, Priority, RequestGroup
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
    await asyncio.wait_for(second, 30)


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


def member(name: str, size: int) -> GenerationRequest:
    return replace(request("a", max_tokens=1), group=RequestGroup(name, size))


def test_the_first_of_a_group_decides_for_all() -> None:
    admission = Admission(4)
    # One runs; of five places, four are left.
    assert admission.admits(member("a", 3), 1, 1, 0)
    # Of the four, one has come, and two are kept.
    assert not admission.admits(member("b", 2), 2, 1, 0)
    assert admission.admits(request("single"), 2, 1, 0)
    assert not admission.admits(request("another"), 3, 1, 0)
    # Others may have ended since: the decision for a group stays.
    assert not admission.admits(member("b", 2), 0, 1, 0)
    assert admission.admits(member("a", 3), 99, 1, 0)
    assert admission.admits(member("a", 3), 99, 1, 0)
    # All have come; the same name is another group.
    assert not admission.admits(member("a", 3), 3, 1, 0)


def test_places_of_a_group_that_never_comes_are_free_again() -> None:
    admission = Admission(4)
    first = member("a", 5)
    assert admission.admits(first, 0, 1, 0)
    assert not admission.admits(request("b"), 1, 1, 9)
    assert admission.admits(request("b"), 1, 1, 11)
    admission = Admission(4)
    assert admission.admits(first, 0, 1, 0)
    admission.give_up(first)
    assert admission.admits(request("b"), 1, 1, 1)
    assert not admission.admits(member("a", 5), 0, 1, 1)


def test_a_request_that_is_resumed_is_admitted() -> None:
    assert Admission(1).admits(replace(request("a"), generated=(1,)), 99, 1, 0)


async def test_free_rows_take_what_the_queue_could_not() -> None:
    stepper = FakeStepper(max_sequences=8)
    engine = open_engine(stepper, max_waiting=1)
    answers = await asyncio.gather(*(run(engine, member("a", 9)) for _ in range(9)))
    assert len(answers) == 9
    await engine.close()


async def test_a_group_that_does_not_fit_starts_nothing_and_keeps_no_place() -> None:
    stepper = FakeStepper(max_sequences=2)
    engine = open_engine(stepper, max_waiting=3)
    stepper.gate.clear()
    group = member("a", 4)
    first = [asyncio.ensure_future(run(engine, group)) for _ in range(4)]
    # The first step may begin before all four have come: one or two of them run.
    await until(lambda: engine.load().running + engine.load().waiting == 4)
    await until(stepper.stepping.is_set)
    waiting = engine.load().waiting
    results = await asyncio.gather(
        *(run(engine, member("b", 2)) for _ in range(2)), return_exceptions=True
    )
    assert all(isinstance(each, QueueFull) and each.retry_after_s for each in results)
    assert engine.load().waiting == waiting
    for task in first:
        task.cancel()
    await asyncio.gather(*first, return_exceptions=True)
    stepper.gate.set()
    await until(lambda: not (engine.load().running or engine.load().waiting))
    assert not stepper.running
    with pytest.raises(QueueFull, match=r"6 sequences .* at most 5 ") as caught:
        await run(engine, member("c", 6))
    assert not caught.value.may_retry
    await asyncio.gather(*(run(engine, member("d", 5)) for _ in range(5)))
    await engine.close()
