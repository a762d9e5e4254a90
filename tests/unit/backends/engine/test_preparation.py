"""Tests of the threads that prepare requests, with work that the test holds back."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from backends.abilities import count_tokens
from backends.cancellation import check_cancelled
from backends.echo import ByteTokenizer, echo_info
from backends.engine.batching import BatchingEngine
from backends.engine.preparation import MAX_RUNNING, PreparationThreads
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Prepared, Preparer
from backends.watch import StepWatch
from core.errors import EngineFailed, RequestError, TimedOut
from core.types import GenerationRequest, Prompt, TextPrompt
from tests.requests import request, run, text_of
from tests.unit.backends.engine.test_batching import FakeStepper, until

_LIMIT_S = 60


class Panic(BaseException):
    """Stands for pyo3_runtime.PanicException."""


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return an event that slow work waits for; it is set at the end."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def watch() -> StepWatch:
    return StepWatch()


@pytest.fixture
def threads(gate: threading.Event, watch: StepWatch) -> Iterator[PreparationThreads]:
    threads = PreparationThreads(watch)
    yield threads
    gate.set()
    threads.close()


def held(gate: threading.Event) -> Callable[[], bool]:
    return lambda: gate.wait(_LIMIT_S)


def test_short_work_runs_in_order_and_one_after_the_other(threads: PreparationThreads) -> None:
    order: list[int] = []
    running: list[int] = []

    def work(number: int) -> None:
        running.append(number)
        assert running == [number]
        order.append(number)
        running.remove(number)

    jobs = [threads.submit(lambda number=number: work(number)) for number in range(50)]  # type: ignore[misc]
    for job in jobs:
        job.done.result(_LIMIT_S)
    assert order == list(range(50))


def test_slow_work_does_not_hold_up_what_comes_after_it(
    threads: PreparationThreads, gate: threading.Event
) -> None:
    slow = [threads.submit(held(gate)) for _ in range(3)]
    assert threads.submit(lambda: "passed").done.result(_LIMIT_S) == "passed"
    assert not any(job.done.done() for job in slow)


def test_the_number_of_threads_is_bounded(
    threads: PreparationThreads, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.engine.preparation.PATIENCE_S", 0.0)
    started: list[int] = []

    def work() -> None:
        started.append(1)
        gate.wait(_LIMIT_S)

    jobs = [threads.submit(work) for _ in range(MAX_RUNNING + 5)]
    assert not jobs[-1].done.done()
    gate.set()
    for job in jobs:
        job.done.result(_LIMIT_S)
    assert len(started) == MAX_RUNNING + 5
    names = [each.name for each in threading.enumerate()]
    assert names.count("impetus-prepare") <= MAX_RUNNING + 1


def test_cancelled_work_is_skipped(threads: PreparationThreads, gate: threading.Event) -> None:
    done: list[str] = []
    first = threads.submit(held(gate))
    skipped = threads.submit(lambda: done.append("skipped"))
    skipped.cancel()
    gate.set()
    first.done.result(_LIMIT_S)
    threads.submit(lambda: done.append("last")).done.result(_LIMIT_S)
    assert done == ["last"]


def test_running_work_sees_that_it_is_cancelled(threads: PreparationThreads) -> None:
    started = threading.Event()

    def work() -> None:
        started.set()
        while True:
            check_cancelled()

    job = threads.submit(work)
    assert started.wait(_LIMIT_S)
    job.cancel()
    with pytest.raises(EngineFailed, match="cancelled"):
        job.done.result(_LIMIT_S)


@pytest.mark.parametrize(
    ("problem", "expected", "text"),
    [
        (Panic("regex"), RequestError, "a library failed on its text or schema \\(Panic\\)"),
        (RecursionError(), RequestError, "nested too deeply"),
        (RequestError("wrong"), RequestError, "wrong"),
        (ValueError("bug"), ValueError, "bug"),
    ],
)
def test_whatever_work_raises_fails_its_own_request_only(
    threads: PreparationThreads,
    problem: BaseException,
    expected: type[Exception],
    text: str,
) -> None:
    def work() -> None:
        raise problem

    job = threads.submit(work)
    with pytest.raises(expected, match=text):
        job.done.result(_LIMIT_S)
    assert threads.submit(lambda: 7).done.result(_LIMIT_S) == 7


def test_the_watch_measures_work_that_hangs(
    threads: PreparationThreads, gate: threading.Event, watch: StepWatch
) -> None:
    job = threads.submit(held(gate))
    while not watch.lasted_s:
        assert not job.done.done()
    gate.set()
    job.done.result(_LIMIT_S)
    threads.close()
    assert not watch.lasted_s


def test_closing_fails_what_waits_and_stops_what_runs(threads: PreparationThreads) -> None:
    started = threading.Event()

    def work() -> None:
        started.set()
        while True:
            check_cancelled()

    jobs = [threads.submit(work) for _ in range(3)]
    assert started.wait(_LIMIT_S)
    threads.close()
    for job in jobs:
        assert isinstance(job.done.exception(_LIMIT_S), EngineFailed)
    with pytest.raises(EngineFailed, match="unloaded"):
        threads.submit(work)


def test_a_machine_without_threads_left_fails_the_request(
    threads: PreparationThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(EngineFailed, match="No thread"):
            threads.submit(lambda: 7).done.result(_LIMIT_S)
    assert threads.submit(lambda: 7).done.result(_LIMIT_S) == 7


class SlowPreparer(Preparer):
    """Holds back requests whose prompt says so."""

    def __init__(self, gate: threading.Event) -> None:
        chat = ChatFormat(None, "", "")
        super().__init__(echo_info(), ByteTokenizer(), chat, context_tokens=256)
        self._gate = gate
        self.prepared: list[str] = []

    def prepare(self, request: GenerationRequest) -> Prepared:
        if request.prompt == TextPrompt("slow"):
            self._gate.wait(_LIMIT_S)
        if request.prompt == TextPrompt("panic"):
            raise Panic
        self.prepared.append(request.id)
        return super().prepare(request)

    def count(self, prompt: Prompt) -> int:
        self._gate.wait(_LIMIT_S)
        return super().count(prompt)


@pytest.fixture
def engine(gate: threading.Event) -> BatchingEngine:
    return BatchingEngine(echo_info(), SlowPreparer(gate), FakeStepper, max_waiting=30)


async def test_requests_pass_one_whose_preparation_is_slow(
    engine: BatchingEngine, gate: threading.Event
) -> None:
    slow = [asyncio.ensure_future(run(engine, request("slow", max_tokens=2))) for _ in range(3)]
    answers = await asyncio.gather(*(run(engine, request("a", max_tokens=2)) for _ in range(3)))
    assert [text_of(events) for events in answers] == ["xx"] * 3
    assert not any(each.done() for each in slow)
    assert engine.stalled_s > 0
    gate.set()
    assert [text_of(events) for events in await asyncio.gather(*slow)] == ["xx"] * 3
    await engine.close()


async def test_a_panic_while_preparing_fails_that_request_only(engine: BatchingEngine) -> None:
    with pytest.raises(RequestError, match="library failed"):
        await run(engine, request("panic", max_tokens=2))
    assert text_of(await run(engine, request("a", max_tokens=2))) == "xx"
    assert not engine.is_failed
    await engine.close()


async def test_a_request_that_left_is_not_prepared(
    engine: BatchingEngine, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing passes the slow one.
    monkeypatch.setattr("backends.engine.preparation.PATIENCE_S", _LIMIT_S)
    preparer = engine._preparer
    assert isinstance(preparer, SlowPreparer)
    slow = asyncio.ensure_future(run(engine, request("slow", max_tokens=2)))
    await until(lambda: engine.load().waiting == 1)
    gone = asyncio.ensure_future(run(engine, request("a", max_tokens=2)))
    await until(lambda: engine.load().waiting == 2)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert engine.load().waiting == 1
    gate.set()
    await slow
    assert len(preparer.prepared) == 1
    await engine.close()


async def test_preparing_obeys_the_deadline(engine: BatchingEngine, gate: threading.Event) -> None:
    with pytest.raises(TimedOut):
        await run(engine, request("slow", max_tokens=2, deadline_s=0.05))
    gate.set()
    await engine.close()


async def test_counting_tokens_has_a_deadline(
    engine: BatchingEngine, gate: threading.Event
) -> None:
    with pytest.raises(TimedOut, match=r"0\.05 s"):
        await count_tokens(engine, TextPrompt("a"), 0.05)
    gate.set()
    await engine.close()
