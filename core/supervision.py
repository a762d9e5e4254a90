"""Supervises the background tasks of a process: restarts, logs and counts those that fail."""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, cast

from core.awake_time import AwakeTimeout
from core.errors import Unavailable

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Work: TypeAlias = Callable[[], Awaitable[None]]
PartStatus: TypeAlias = Literal["running", "restarting", "failing", "ended"]

_LOG_INTERVAL_S = 60.0
_LONGEST_REASON = 200


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How a part is restarted; all times in seconds.

    The delay doubles from `first_delay_s` to `longest_delay_s`.  A part that fails `most_failures`
    times in a row, over at least `least_s`, counts as failing; a run of at least `settled_s` starts
    the count again.  A part that has not called `beat` for `silence_s` is cancelled and restarted;
    None: it never is.  The process can do without a part that is not vital: it is restarted and
    counted, no more.
    """

    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    most_failures: int = 5
    least_s: float = 5.0
    settled_s: float = 10.0
    silence_s: float | None = None
    is_vital: bool = True

    def delay_s(self, failures: int) -> float:
        """Return the delay after this many failures in a row."""
        # The exponent is bounded because a part may fail for days.
        return min(self.first_delay_s * 2.0 ** min(failures - 1, 30), self.longest_delay_s)


DEFAULT_POLICY = RestartPolicy()


@dataclass(frozen=True, slots=True)
class PartView:
    """State of one part: `failures` since the start of the process, `reason` of the last one."""

    name: str
    status: PartStatus
    failures: int = 0
    reason: str = ""


@dataclass(slots=True, eq=False)
class _Part:
    name: str
    policy: RestartPolicy
    status: PartStatus = "running"
    failures: int = 0
    in_a_row: int = 0
    failing_since: float = 0.0
    has_attempts: bool = False
    reason: str = ""
    supervisor: "Supervisor | None" = None
    task: "asyncio.Task[None] | None" = None
    timeout: AwakeTimeout | None = None
    logged: "dict[str, _Logged]" = field(default_factory=dict)


@dataclass(slots=True)
class _Logged:
    at: float
    unlogged: int = 0


_current: ContextVar[_Part | None] = ContextVar("supervised part", default=None)


def beat() -> None:
    """Tell the supervisor that the current part makes progress; does nothing elsewhere."""
    part = _current.get()
    if part is None or part.timeout is None or part.policy.silence_s is None:
        return
    part.timeout.restart(part.policy.silence_s)


async def attempt(work: Work, *, is_vital: bool = True) -> bool:
    """Run `work` once for the current part; return whether it worked.

    For parts that repeat something: what it raises is logged and counted, and does not end the
    part.  Failures in a row make the part failing, unless it can do without (`is_vital` False).
    """
    part = _current.get()
    if part is not None:
        part.has_attempts = True
    try:
        await work()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as problem:
        if _is_cancelled():
            raise
        if part is None or part.supervisor is None:
            logger.error("a background task failed; it is tried again", exc_info=problem)
        else:
            part.supervisor.record_attempt(part, problem, is_vital=is_vital)
        return False
    finally:
        beat()
    if part is not None:
        part.in_a_row, part.status, part.reason = 0, "running", ""
    return True


def log_failure(task: "asyncio.Task[Any]") -> None:
    """Log what a task raised; a done callback for tasks whose result may interest nobody."""
    if not task.cancelled() and (problem := task.exception()) is not None:
        logger.error("the task %s failed", task.get_name(), exc_info=problem)


async def call_in_thread(name: str, function: Callable[[], Result]) -> Result:
    """Run `function` on a daemon thread of its own and return its result.

    For work that may hang: it neither takes a thread of the shared pool nor keeps the process from
    exiting.  Cancelling leaves the thread running.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, problem: BaseException | None) -> None:
        if answer.done():
            return
        if problem is None:
            answer.set_result(cast(Result, result))
        else:
            answer.set_exception(problem)

    def run() -> None:
        result, problem = None, None
        try:
            result = function()
        except BaseException as error:
            # A future cannot hold StopIteration.
            problem = RuntimeError(repr(error)) if isinstance(error, StopIteration) else error
        try:
            loop.call_soon_threadsafe(settle, result, problem)
        except RuntimeError:
            logger.debug("the event loop closed before %s had ended", name)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await answer


class Supervisor:
    """Runs the parts of one process on one event loop.

    `keep_running` restarts a part whenever it ends, `run_until_done` until it returns, `run_once`
    never.  `problems` tells what does not run now, `check_health` raises for what keeps failing.
    """

    def __init__(
        self, policy: RestartPolicy = DEFAULT_POLICY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.policy = policy
        self._clock = clock
        self._parts: list[_Part] = []
        self._once: set[asyncio.Task[Any]] = set()
        self._once_failures = _Part("single tasks", policy, status="ended")

    def keep_running(
        self, name: str, work: Work, policy: RestartPolicy | None = None
    ) -> "asyncio.Task[None]":
        """Run `work` until cancelled; restart it when it raises or returns.

        Returns the task; cancelling it removes the part.
        """
        return self._add(name, work, policy, may_return=False)

    def run_until_done(
        self, name: str, work: Work, policy: RestartPolicy | None = None
    ) -> "asyncio.Task[None]":
        """Run `work` until it returns once; restart it when it raises."""
        return self._add(name, work, policy, may_return=True)

    def run_once(self, name: str, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run `work` without a restart; what it raises is logged and counted.

        Others may await the returned task.
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._once.add(task)
        task.add_done_callback(self._on_once_done)
        return task

    def parts(self) -> Sequence[PartView]:
        """Return the state of every part."""
        supervised = [
            PartView(one.name, one.status, one.failures, one.reason) for one in self._parts
        ]
        once = self._once_failures
        single = [PartView(once.name, once.status, once.failures, once.reason)]
        return [*supervised, *(single if once.failures else ())]

    def problems(self) -> list[str]:
        """Return a sentence for each part that does not run at the moment."""
        return [
            f"The {one.name} failed and is being restarted ({one.reason})."
            for one in self.parts()
            if one.status in ("restarting", "failing")
        ]

    def check_health(self) -> None:
        """Raise Unavailable if a part keeps failing although it is restarted."""
        failing = [one for one in self.parts() if one.status == "failing"]
        if failing:
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in failing)
            raise Unavailable(f"Background tasks keep failing: {reasons}", retry_after_s=5)

    def cancel(self) -> None:
        """Cancel every task; does not wait for them."""
        for task in self._tasks():
            task.cancel()

    async def stop(self) -> None:
        """Cancel every task and wait until they have ended."""
        tasks = self._tasks()
        self.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tasks(self) -> "list[asyncio.Task[Any]]":
        return [*(one.task for one in self._parts if one.task is not None), *self._once]

    def _add(
        self, name: str, work: Work, policy: RestartPolicy | None, *, may_return: bool
    ) -> "asyncio.Task[None]":
        part = _Part(name, policy or self.policy, supervisor=self)
        self._parts.append(part)
        part.task = asyncio.get_running_loop().create_task(
            self._run(part, work, may_return=may_return), name=name
        )
        return part.task

    async def _run(self, part: _Part, work: Work, *, may_return: bool) -> None:
        _current.set(part)
        try:
            while await self._attempt(part, work, may_return=may_return):
                await asyncio.sleep(part.policy.delay_s(part.in_a_row))
        finally:
            self._parts.remove(part)

    async def _attempt(self, part: _Part, work: Work, *, may_return: bool) -> bool:
        """Run `work` once; return whether it has to be started again."""
        part.has_attempts = False
        if part.status != "failing":
            part.status = "running"
        settled = asyncio.get_running_loop().call_later(part.policy.settled_s, self._settle, part)
        try:
            async with AwakeTimeout(part.policy.silence_s) as part.timeout:
                await work()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as problem:
            # A cancelled inner call raises CancelledError as well; it must not end this task.
            if _is_cancelled():
                raise
            self._record(part, problem)
            return True
        finally:
            settled.cancel()
        if may_return:
            return False
        self._record(part, RuntimeError("it ended although it should run on"))
        return True

    @staticmethod
    def _settle(part: _Part) -> None:
        if part.has_attempts:
            return
        part.in_a_row = 0
        part.status, part.reason = "running", ""

    def record_attempt(self, part: _Part, problem: BaseException, *, is_vital: bool) -> None:
        """Count a failure that did not end the part; see `attempt`."""
        self._count(part, problem)
        if is_vital and part.policy.is_vital and self._keeps_failing(part):
            part.status = "failing"
        self._log(part, problem, "it is tried again")

    def _keeps_failing(self, part: _Part) -> bool:
        has_failed_often = part.in_a_row >= part.policy.most_failures
        return has_failed_often and self._clock() - part.failing_since >= part.policy.least_s

    def _count(self, part: _Part, problem: BaseException) -> None:
        part.failures += 1
        if not part.in_a_row:
            part.failing_since = self._clock()
        part.in_a_row += 1
        part.reason = _describe(problem)

    def _record(self, part: _Part, problem: BaseException) -> None:
        self._count(part, problem)
        if part.policy.is_vital:
            part.status = "failing" if self._keeps_failing(part) else "restarting"
        delay_s = part.policy.delay_s(part.in_a_row)
        self._log(part, problem, f"it is restarted in {delay_s:g} s")

    def _on_once_done(self, task: "asyncio.Task[Any]") -> None:
        self._once.discard(task)
        if task.cancelled():
            return
        problem = task.exception()
        if problem is not None:
            single = self._once_failures
            single.failures += 1
            single.reason = f"{task.get_name()}: {_describe(problem)}"
            self._log(single, problem, f"{task.get_name()} is not repeated")

    def _log(self, part: _Part, problem: BaseException, what_next: str) -> None:
        """Log a distinct problem with its traceback, then at most once a minute without it."""
        now, key = self._clock(), _place(problem)
        known = part.logged.get(key)
        if known is None:
            # Few places can raise; the bound holds for exception types made at run time.
            if len(part.logged) >= 100:
                part.logged.clear()
            part.logged[key] = _Logged(now)
            logger.error("the %s failed; %s", part.name, what_next, exc_info=problem)
            return
        known.unlogged += 1
        if now - known.at >= _LOG_INTERVAL_S:
            logger.error(
                "the %s failed %d more times: %s; %s",
                part.name,
                known.unlogged,
                _describe(problem),
                what_next,
            )
            known.at, known.unlogged = now, 0


def _is_cancelled() -> bool:
    """Whether someone cancelled the current task, not only a call that it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _describe(problem: BaseException) -> str:
    text = str(problem).strip()
    name = type(problem).__name__
    return (f"{name}: {text}" if text else name)[:_LONGEST_REASON]


def _place(problem: BaseException) -> str:
    """Return a key for the same problem raised at the same place."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return f"{type(problem).__name__} {where}"
