"""The supervisor: a part that fails is restarted, one that keeps failing fails the health check."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator

import pytest

from core.errors import Unavailable
from core.supervision import RestartPolicy, Supervisor, attempt, beat, call_in_thread, log_failure
from tests.waiting import wait_until

FAST = RestartPolicy(first_delay_s=0.001, longest_delay_s=0.002, most_failures=3, least_s=0.0)


class Work:
    """Raises what it is given, once for each item, then runs until cancelled."""

    def __init__(self, *problems: BaseException, is_endless: bool = False) -> None:
        self.problems = list(problems)
        self.is_endless = is_endless
        self.runs = 0

    async def __call__(self) -> None:
        self.runs += 1
        if self.problems:
            raise self.problems[0] if self.is_endless else self.problems.pop(0)
        await asyncio.Event().wait()


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(FAST)
    yield supervisor
    await supervisor.stop()
    assert supervisor.parts() == []


class Panic(BaseException):
    """What a native extension raises."""


@pytest.mark.parametrize(
    "problem", [ValueError("once"), Panic("native"), asyncio.CancelledError(), MemoryError()]
)
async def test_a_part_that_raises_once_works_again(
    supervisor: Supervisor, problem: BaseException
) -> None:
    work = Work(problem)
    supervisor.keep_running("part", work)
    await wait_until(lambda: work.runs == 2, "the part runs again")
    assert supervisor.problems() == []
    supervisor.check_health()
    assert [(one.name, one.status, one.failures) for one in supervisor.parts()] == [
        ("part", "running", 1)
    ]


async def test_a_part_that_always_raises_fails_the_health_check_and_is_still_tried(
    supervisor: Supervisor,
) -> None:
    work = Work(OSError("no space left"), is_endless=True)
    supervisor.keep_running("publisher", work)
    await wait_until(lambda: work.runs > 5, "the part is tried again and again")
    assert "publisher" in supervisor.problems()[0]
    assert "no space left" in supervisor.problems()[0]
    with pytest.raises(Unavailable, match="publisher: OSError: no space left"):
        supervisor.check_health()


async def test_a_part_that_works_again_for_a_while_is_healthy() -> None:
    policy = RestartPolicy(0.001, 0.001, most_failures=2, least_s=0.0, settled_s=0.05)
    supervisor = Supervisor(policy)
    work = Work(OSError("a"), OSError("b"))
    supervisor.keep_running("part", work)
    await wait_until(lambda: work.runs == 3, "the part works")
    with pytest.raises(Unavailable):
        supervisor.check_health()
    await wait_until(lambda: not supervisor.problems(), "the part has settled")
    supervisor.check_health()
    await supervisor.stop()


async def test_a_part_that_returns_is_restarted_unless_it_may(supervisor: Supervisor) -> None:
    runs = {"endless": 0, "single": 0}

    async def endless() -> None:
        runs["endless"] += 1

    async def single() -> None:
        runs["single"] += 1
        if runs["single"] < 3:
            raise ValueError("not yet")

    supervisor.keep_running("endless", endless)
    done = supervisor.run_until_done("single", single)
    await done
    await wait_until(lambda: runs["endless"] > 2, "what returns is restarted")
    assert runs["single"] == 3
    assert [one.name for one in supervisor.parts()] == ["endless"]


async def test_a_part_without_a_sign_of_life_is_restarted() -> None:
    supervisor = Supervisor(RestartPolicy(0.001, 0.001, silence_s=0.05))
    runs: list[str] = []

    async def hangs_at_first() -> None:
        runs.append("run")
        if len(runs) == 1:
            await asyncio.Event().wait()
        while True:
            beat()
            await asyncio.sleep(0.001)

    supervisor.keep_running("part", hangs_at_first)
    await wait_until(lambda: len(runs) == 2, "the hung part is restarted")
    # Beats that came for longer than the limit kept it running.
    await wait_until(lambda: supervisor.parts()[0].status == "running", "it runs")
    assert supervisor.parts()[0].failures == 1
    await supervisor.stop()


async def test_a_task_that_runs_once_is_logged_counted_and_raised_to_who_waits(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        raise KeyError("lost")

    task = supervisor.run_once("load of a", fails())
    with pytest.raises(KeyError):
        await task
    await wait_until(lambda: supervisor.parts(), "the failure is counted")
    assert "load of a" in caplog.text
    assert supervisor.parts()[0].failures == 1
    supervisor.check_health()
    assert supervisor.problems() == []
    supervisor._once_failures.failures = 0


async def test_the_same_problem_is_logged_with_its_traceback_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    supervisor = Supervisor(FAST, clock=lambda: now)
    work = Work(OSError("no space left"), is_endless=True)
    with caplog.at_level(logging.ERROR):
        supervisor.keep_running("scan", work)
        await wait_until(lambda: work.runs > 10, "the part failed often")
        assert caplog.text.count("Traceback") == 1
        assert len(caplog.records) == 1
        now = 61.0
        await wait_until(lambda: len(caplog.records) == 2, "it is summed up")
    assert "more times: OSError: no space left" in caplog.records[1].getMessage()
    assert caplog.text.count("Traceback") == 1
    await supervisor.stop()


def test_delays_grow_up_to_the_longest() -> None:
    delays = [RestartPolicy().delay_s(failures) for failures in (1, 2, 3, 7, 10_000)]
    assert delays == [0.5, 1.0, 2.0, 30.0, 30.0]


async def test_a_call_on_its_own_thread_returns_raises_and_can_be_left() -> None:
    assert await call_in_thread("thread", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await call_in_thread("thread", lambda: 1 // 0)
    gate, left = threading.Event(), threading.Event()

    def hang() -> None:
        gate.wait(30)
        left.set()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call_in_thread("thread", hang), 0.01)
    gate.set()
    await wait_until(left.is_set, "the thread ends")


@pytest.mark.parametrize("is_vital", [True, False])
async def test_attempts_that_fail_do_not_end_the_part(
    supervisor: Supervisor, *, is_vital: bool
) -> None:
    results: list[bool] = []
    is_broken = True

    async def step() -> None:
        if is_broken:
            raise asyncio.CancelledError

    async def loop() -> None:
        while True:
            results.append(await attempt(step, is_vital=is_vital))
            await asyncio.sleep(0.001)

    supervisor.keep_running("poll", loop)
    await wait_until(lambda: len(results) >= 3, "it is tried again")
    assert not any(results)
    # Whether a part that fails is a fault of the process depends on the part.
    assert bool(supervisor.problems()) is is_vital
    assert supervisor.parts()[0].failures >= 3
    is_broken = False
    await wait_until(lambda: results[-1], "it works again")
    supervisor.check_health()
    assert supervisor.problems() == []


async def test_an_attempt_outside_a_part_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise ValueError("no part")

    assert not await attempt(fails)
    assert "no part" in caplog.text


async def test_a_part_that_is_not_vital_is_restarted_and_counted_only(
    supervisor: Supervisor,
) -> None:
    work = Work(OSError("away"), is_endless=True)
    policy = RestartPolicy(0.001, 0.001, most_failures=1, is_vital=False)
    supervisor.keep_running("recovery", work, policy)
    await wait_until(lambda: work.runs > 3, "it is restarted")
    supervisor.check_health()
    assert supervisor.problems() == []
    assert supervisor.parts()[0].failures >= 3
    assert "away" in supervisor.parts()[0].reason


async def test_a_task_that_nobody_awaits_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise ValueError("unseen")

    task = asyncio.ensure_future(fails())
    task.add_done_callback(log_failure)
    await asyncio.wait({task})
    await wait_until(lambda: "unseen" in caplog.text, "the failure is logged")
    cancelled = asyncio.ensure_future(asyncio.Event().wait())
    cancelled.add_done_callback(log_failure)
    cancelled.cancel()
    await asyncio.wait({cancelled})
    assert caplog.text.count("the task") == 1


async def test_many_failures_in_a_short_time_are_not_failing_yet() -> None:
    now = 0.0
    policy = RestartPolicy(0.001, 0.001, most_failures=3, least_s=5.0)
    supervisor = Supervisor(policy, clock=lambda: now)
    work = Work(OSError("away"), is_endless=True)
    supervisor.keep_running("part", work)
    await wait_until(lambda: work.runs > 5, "it failed often")
    supervisor.check_health()
    now = 5.0
    await wait_until(lambda: supervisor.parts()[0].status == "failing", "it keeps failing")
    with pytest.raises(Unavailable):
        supervisor.check_health()
    await supervisor.stop()
