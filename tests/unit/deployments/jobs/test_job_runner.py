"""The runner of long jobs with a handler of the test's own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from catalog.job_store import JobStore
from catalog.jobs import Job, JobInterrupted, JobLimits
from core.errors import (
    BrokenModel,
    CatalogNotWritten,
    HubRateLimited,
    ImpetusError,
    InsufficientDisk,
    NotFound,
    RequestError,
)
from deployments.jobs.runner import JobRunner, Report


class Handler:
    """Work that ends when the test says how."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Future[None]] = {}
        self.reports: dict[str, Report] = {}
        self.started: list[str] = []
        self.discarded: list[str] = []

    async def run(self, job: Job, report: Report) -> None:
        self.started.append(job.title)
        self.running[job.title] = asyncio.get_running_loop().create_future()
        self.reports[job.title] = report
        try:
            await self.running[job.title]
        finally:
            del self.running[job.title]

    async def discard(self, job: Job) -> None:
        self.discarded.append(job.title)

    def end(self, title: str, problem: Exception | None = None) -> None:
        if problem is None:
            self.running[title].set_result(None)
        else:
            self.running[title].set_exception(problem)


class Bench:
    """A runner with a clock and limits that the test sets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handler = Handler()
        self.now = 1_800_000_000.0
        self.limits = JobLimits()
        self.changes: list[tuple[str, str]] = []
        self.runner: JobRunner

    @asynccontextmanager
    async def running(self) -> AsyncIterator[JobRunner]:
        store = JobStore(self.path)
        self.runner = JobRunner(
            store,
            {"download": self.handler},
            lambda: self.limits,
            on_change=lambda job: self.changes.append((job.title, job.state)),
            clock=lambda: self.now,
        )
        task = asyncio.create_task(self.runner.run())
        await asyncio.sleep(0)
        try:
            yield self.runner
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            store.close()

    def add(self, title: str) -> Job:
        return self.runner.add("download", title, title)

    def state(self, job: Job) -> str:
        return self.runner.job(job.id).state

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.runner._changed.set()
            await asyncio.sleep(0.005)

    async def until_state(self, job: Job, state: str) -> Job:
        await self.until(lambda: self.state(job) == state)
        return self.runner.job(job.id)

    def stored(self) -> dict[str, str]:
        store = JobStore(self.path)
        found: dict[str, str] = {job.title: job.state for job in store.jobs()}
        store.close()
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "jobs.sqlite")


async def test_jobs_run_one_after_the_other_and_are_stored(bench: Bench) -> None:
    async with bench.running():
        first, second = bench.add("a"), bench.add("b")
        await bench.until(lambda: "a" in bench.handler.running)
        bench.handler.reports["a"](5, 10)
        assert bench.state(second) == "queued"
        bench.handler.end("a")
        await bench.until(lambda: "b" in bench.handler.running)
        assert bench.runner.job(first.id).done == 10
        bench.handler.end("b")
        await bench.until_state(second, "done")
        await bench.until(lambda: bench.stored() == {"a": "done", "b": "done"})
    assert bench.changes[:3] == [("a", "queued"), ("b", "queued"), ("a", "running")]


async def test_job_of_the_same_work_is_joined(bench: Bench) -> None:
    async with bench.running():
        first = bench.add("a")
        await bench.until(lambda: "a" in bench.handler.running)
        assert bench.add("a").id == first.id
        bench.handler.end("a")
        await bench.until_state(first, "done")
        assert bench.add("a").id != first.id
        with pytest.raises(RequestError, match="not a kind of job"):
            bench.runner.add("other", "x", "x")
        with pytest.raises(NotFound, match="There is no job 'none'"):
            bench.runner.pause("none")


async def test_job_is_paused_resumed_and_cancelled(bench: Bench) -> None:
    async with bench.running():
        job = bench.add("a")
        await bench.until(lambda: "a" in bench.handler.running)
        bench.runner.pause(job.id)
        await bench.until(lambda: not bench.handler.running)
        assert (bench.state(job), bench.handler.discarded) == ("paused", [])
        bench.runner.resume(job.id)
        await bench.until(lambda: "a" in bench.handler.running)
        bench.runner.cancel(job.id)
        await bench.until(lambda: bench.handler.discarded == ["a"])
        assert (bench.state(job), bench.handler.started) == ("cancelled", ["a", "a"])
        # One that does not run leaves nothing either.
        bench.limits = JobLimits(parallel={"download": 0})
        idle = bench.add("b")
        bench.runner.cancel(idle.id)
        await bench.until(lambda: bench.handler.discarded == ["a", "b"])


@pytest.mark.parametrize(
    ("problem", "state", "wait_s"),
    [
        (HubRateLimited("later", retry_after_s=17), "waiting", 17),
        (HubRateLimited("later"), "waiting", 60),
        (InsufficientDisk("full"), "waiting", 300),
        (JobInterrupted("killed"), "running", None),
        (BrokenModel("broken"), "failed", None),
        (ValueError("secret"), "failed", None),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_job_that_fails_waits_goes_on_or_ends(
    bench: Bench, problem: Exception, state: str, wait_s: int | None
) -> None:
    async with bench.running():
        job = bench.add("a")
        await bench.until(lambda: "a" in bench.handler.running)
        bench.handler.end("a", problem)
        if state == "running":
            await bench.until(lambda: bench.handler.started == ["a", "a"])
        found = await bench.until_state(job, state)
        assert "secret" not in found.reason
        if isinstance(problem, ImpetusError) and state != "running":
            assert (found.reason, found.code) == (problem.message, problem.code)
        if wait_s is not None:
            assert found.not_before == bench.now + wait_s
            bench.now += wait_s
            await bench.until(lambda: bench.handler.started == ["a", "a"])


async def test_jobs_that_are_held_back_stop_and_go_on(bench: Bench) -> None:
    async with bench.running():
        job = bench.add("a")
        await bench.until(lambda: "a" in bench.handler.running)
        bench.limits = JobLimits(held={"download": "the machine is hot"})
        found = await bench.until_state(job, "waiting")
        assert (found.reason, found.code) == ("the machine is hot", "held")
        await bench.until(lambda: not bench.handler.running)
        bench.limits = JobLimits()
        await bench.until(lambda: bench.handler.started == ["a", "a"])


async def test_jobs_go_on_after_the_end_of_the_server(bench: Bench) -> None:
    async with bench.running():
        bench.add("a")
        paused = bench.add("b")
        bench.runner.pause(paused.id)
        await bench.until(lambda: "a" in bench.handler.running)
    assert bench.handler.running == {}
    assert bench.stored() == {"a": "interrupted", "b": "paused"}
    async with bench.running():
        await bench.until(lambda: bench.handler.started == ["a", "a"])
        assert bench.runner.job(paused.id).state == "paused"


async def test_jobs_run_while_their_store_cannot_be_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.running():
        store, save = bench.runner._store, bench.runner._store.save

        def fails(_: object) -> None:
            raise CatalogNotWritten("full")

        monkeypatch.setattr(store, "save", fails)
        job = bench.add("a")
        await bench.until(lambda: "a" in bench.handler.running)
        assert bench.stored() == {}
        monkeypatch.setattr(store, "save", save)
        bench.handler.end("a")
        await bench.until(lambda: bench.stored() == {"a": "done"})
        assert bench.state(job) == "done"


async def test_jobs_are_moved(bench: Bench) -> None:
    bench.limits = JobLimits(parallel={"download": 0})
    async with bench.running():
        first, second = bench.add("a"), bench.add("b")
        bench.runner.move(second.id, first.id)
        assert [job.title for job in bench.runner.jobs()] == ["b", "a"]
        bench.limits = JobLimits()
        await bench.until(lambda: bench.handler.started == ["b"])


async def test_runner_is_working_while_a_job_runs(bench: Bench) -> None:
    async with bench.running() as runner:
        assert not runner.is_working
        bench.add("a")
        await bench.until(lambda: "a" in bench.handler.running)
        assert runner.is_working
        bench.handler.end("a")
        await bench.until(lambda: not runner.is_working)
