"""The watch over an engine's activities: the oldest one counts, whatever thread it runs on."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from backends.limits import deadline
from backends.watch import StepWatch, unwatched
from core.errors import TimedOut


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("backends.watch.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_nothing_runs_at_first(clock: Clock) -> None:
    watch = StepWatch()
    clock.now += 5
    assert watch.lasted_s == 0.0
    watch.end()
    assert watch.lasted_s == 0.0


def test_the_oldest_activity_counts(clock: Clock) -> None:
    watch = StepWatch()
    watch.begin("prepare")
    clock.now += 3
    watch.begin()
    clock.now += 2
    assert watch.lasted_s == 5.0
    watch.end("prepare")
    assert watch.lasted_s == 2.0
    watch.end()
    assert watch.lasted_s == 0.0


def test_an_activity_that_begins_again_is_new(clock: Clock) -> None:
    watch = StepWatch()
    watch.begin()
    clock.now += 3
    watch.begin()
    clock.now += 1
    assert watch.lasted_s == 1.0


def test_activities_of_one_name_are_measured_apart(clock: Clock) -> None:
    watch = StepWatch()
    with watch.running("prepare"):
        clock.now += 2
        with watch.running("prepare"):
            clock.now += 1
            assert watch.lasted_s == 3.0
        assert watch.lasted_s == 3.0
    assert watch.lasted_s == 0.0


def test_an_activity_that_raises_has_ended(clock: Clock) -> None:
    watch = StepWatch()
    with pytest.raises(ValueError, match="broken"), watch.running("batch"):
        raise ValueError("broken")
    clock.now += 9
    assert watch.lasted_s == 0.0


def test_threads_may_read_while_others_begin_and_end() -> None:
    watch = StepWatch()
    is_over = threading.Event()
    problems: list[BaseException] = []

    def read() -> None:
        try:
            while not is_over.is_set():
                assert watch.lasted_s >= 0.0
        except BaseException as problem:
            problems.append(problem)

    def work(name: str) -> None:
        for _ in range(2000):
            with watch.running(name):
                watch.begin(name)
                watch.end(name)

    reader = threading.Thread(target=read)
    workers = [threading.Thread(target=work, args=(f"worker {n}",)) for n in range(3)]
    for thread in (reader, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    is_over.set()
    reader.join()
    assert not problems
    assert watch.lasted_s == 0.0


async def test_a_deadline_ends_its_body() -> None:
    with pytest.raises(TimedOut, match=r"its limit of 0.01 s. Ask for fewer inputs"):
        async with deadline(0.01, "inputs"):
            await asyncio.Event().wait()


async def test_without_a_deadline_the_body_ends_by_itself() -> None:
    async with deadline(None):
        await asyncio.sleep(0)


async def test_a_timeout_of_the_body_is_not_the_deadline() -> None:
    with pytest.raises(TimeoutError, match="the template"):
        async with deadline(60.0):
            raise TimeoutError("the template")


def test_an_activity_that_waits_for_others_is_not_measured(clock: Clock) -> None:
    watch = StepWatch()
    with watch.running("prepare"):
        clock.now += 3
        with unwatched():
            clock.now += 100
            assert watch.lasted_s == 0.0
        clock.now += 1
        assert watch.lasted_s == 1.0
    assert watch.lasted_s == 0.0
    with unwatched():
        assert watch.lasted_s == 0.0
