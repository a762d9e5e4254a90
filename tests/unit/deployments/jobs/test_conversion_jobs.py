"""A conversion as a job: memory, holding back, interruptions, what is left and what is removed."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from catalog.convert.forecast import Measured, SpeedFile, measured_kind
from catalog.convert.output import PartialOutput
from catalog.convert.work import ConversionWork
from catalog.jobs import Job, JobInterrupted
from core.errors import BrokenModel, InsufficientDisk, InsufficientMemory, ModelNotFound
from core.settings import Settings
from deployments.jobs.conversions import KIND, ConversionJobs
from deployments.jobs.quality import Comparison
from tests.unit.deployments.jobs.conversion_doubles import (
    FIGURE,
    HELD_BYTES,
    ID,
    Converter,
    Library,
    Memory,
    Quality,
    record,
)
from tests.waiting import wait_until

SIZE = 16 * 10**9


@dataclass
class Bench:
    """Conversion jobs over stand-ins; `now` is the clock of the time that they take."""

    home: Path
    converter: Converter
    library: Library = field(default_factory=lambda: Library(record()))
    memory: Memory = field(default_factory=Memory)
    quality: Quality = field(default_factory=Quality)
    now: float = 100.0
    reports: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        library: Any = self.library
        memory: Any = self.memory
        self.speeds = SpeedFile(self.home / "speeds.json")
        quality: Any = self.quality
        settings = Settings(home=self.home, threads=1)
        self.jobs = ConversionJobs(
            settings, library, memory, self.speeds, quality, lambda: self.now
        )
        target = self.home / "models" / "mlx-4bit" / "m"
        self.work = ConversionWork(ID, "mlx", "4bit", 64, target, SIZE)
        self.job = Job("a1", KIND, "m", self.work.to_json(), 1.0, 1.0, "running")

    def begin(self, job: Job | None = None) -> "asyncio.Task[None]":
        def report(done: int, total: int) -> None:
            self.reports.append((done, total))

        return asyncio.ensure_future(self.jobs.run(job or self.job, report))

    async def begun(self) -> "asyncio.Task[None]":
        """Begin and return once it converts."""
        count = len(self.converter.requests)
        task = self.begin()
        await wait_until(lambda: len(self.converter.requests) > count, "it converts")
        return task


async def stopped(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    converter = Converter()
    monkeypatch.setattr("deployments.jobs.conversions.convert", converter)
    bench = Bench(tmp_path, converter)
    yield bench
    await bench.jobs.close()


async def test_it_converts_with_leased_memory_and_ends_in_the_catalog(bench: Bench) -> None:
    task = await bench.begun()
    (lease,) = bench.memory.asked
    assert (lease.lease_id, lease.model_id) == ("a1", ID)
    assert lease.name == "conversion of m@safetensors-bf16 to mlx-4bit"
    # The largest tensor of eight billion parameters, in several copies.
    assert lease.needed_bytes > 260 * 2**20
    assert bench.memory.measured == [HELD_BYTES]
    assert bench.reports == [(SIZE // 4, SIZE)]
    bench.now += 30
    found = bench.jobs.progress("a1")
    assert found is not None
    assert (found[0].doing, found[1]) == ("reading", 30)
    assert bench.library.registered == []
    bench.converter.gate.set()
    await task
    assert bench.memory.ended == 1
    assert bench.library.registered == [bench.work.target]
    assert bench.jobs.progress("a1") is None
    assert bench.converter.figures == [FIGURE]
    assert bench.quality.compared == [Comparison("a1", record(), bench.work, lease.needed_bytes, 1)]
    (request,) = bench.converter.requests
    assert (request.model_id, request.target) == (ID, bench.work.target)
    measured = bench.speeds.read()[measured_kind("safetensors", "mlx")]
    assert measured == (Measured(SIZE, 30.0),)


async def test_quality_is_not_measured_while_a_request_waits(bench: Bench) -> None:
    bench.job = replace(bench.job, work=replace(bench.work, is_awaited=True).to_json())
    task = await bench.begun()
    bench.converter.gate.set()
    await task
    assert bench.quality.compared == []
    (figure,) = bench.converter.figures
    assert (figure.is_measured, "a request waited" in figure.reason) == (False, True)


async def test_f15_one_that_is_held_back_stops_where_it_is_and_goes_on(bench: Bench) -> None:
    task = await bench.begun()
    await stopped(task)
    (pause,) = bench.converter.pauses
    assert pause.is_on
    assert (bench.converter.cancelled, bench.memory.ended) == (0, 0)
    bench.now += 50
    task = bench.begin()
    await wait_until(lambda: not pause.is_on, "it goes on")
    bench.now += 5
    bench.converter.gate.set()
    await task
    assert len(bench.converter.requests) == 1
    # The time in which it was stopped says nothing about its speed.
    assert bench.speeds.read()[measured_kind("safetensors", "mlx")] == (Measured(SIZE, 5.0),)


async def test_one_that_is_held_back_for_long_gives_its_memory_back_and_begins_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.jobs.conversions.HELD_LIMIT_S", 0.0)
    await stopped(await bench.begun())
    await wait_until(lambda: bench.memory.ended == 1, "its memory is free")
    assert bench.converter.cancelled == 1
    task = await bench.begun()
    bench.converter.gate.set()
    await task
    assert len(bench.converter.requests) == 2


async def test_one_that_waits_for_memory_gives_up_its_place(bench: Bench) -> None:
    bench.memory.gate.clear()
    task = bench.begin()
    await wait_until(lambda: bench.memory.asked, "it asks for memory")
    found = bench.jobs.progress("a1")
    assert found is not None
    assert (found[0].doing, found[1]) == ("waiting for memory", 0.0)
    await stopped(task)
    assert bench.memory.ended == 1
    assert bench.jobs.progress("a1") is None
    assert bench.converter.requests == []


async def test_one_that_is_cancelled_ends_its_processes_and_leaves_nothing(bench: Bench) -> None:
    task = await bench.begun()
    await stopped(task)
    await bench.jobs.discard(bench.job)
    assert (bench.converter.cancelled, bench.memory.ended) == (1, 1)
    assert list(bench.work.target.parent.iterdir()) == []
    # One that never ran has nothing to remove.
    await bench.jobs.discard(bench.job)


@pytest.mark.parametrize(
    "outcome", [JobInterrupted("It was killed."), BrokenModel("It is damaged.")]
)
async def test_its_failure_is_that_of_the_job_and_the_next_run_begins_anew(
    bench: Bench, outcome: Exception
) -> None:
    bench.converter.outcome = outcome
    bench.converter.gate.set()
    with pytest.raises(type(outcome)):
        await bench.begin()
    assert bench.library.registered == []
    assert bench.memory.ended == 1
    bench.converter.outcome = None
    await bench.begin()
    assert bench.library.registered == [bench.work.target]


async def test_a_run_that_begins_anew_is_no_progress_until_it_is_further(bench: Bench) -> None:
    """Else a process that dies at the same place each time would be started for ever."""
    further = Job("a1", KIND, "m", bench.work.to_json(), 1.0, 1.0, "running", done=SIZE // 2)
    bench.converter.gate.set()
    await bench.begin(further)
    assert bench.reports == [(SIZE // 2, SIZE)]


async def test_a_result_that_was_complete_when_its_process_died_is_not_made_again(
    bench: Bench,
) -> None:
    bench.converter.gate.set()
    await bench.begin()
    await bench.begin()
    assert len(bench.converter.requests) == 1
    assert bench.library.registered == [bench.work.target] * 2


async def test_a_result_that_the_scan_refuses_is_removed(bench: Bench) -> None:
    bench.library.refusal = BrokenModel("m cannot be used here: it is odd")
    bench.converter.gate.set()
    with pytest.raises(BrokenModel, match="it is odd"):
        await bench.begin()
    assert not bench.work.target.exists()


async def test_leftovers_of_a_process_that_died_are_removed(bench: Bench) -> None:
    parent = bench.work.target.parent
    parent.mkdir(parents=True)
    left = PartialOutput.create(bench.work.target)
    bench.jobs.sweep()
    assert left.folder.exists()
    # Its owner's lock ends with the process.
    left.remove()
    (parent / left.folder.name).mkdir()
    (parent / left.folder.name / "lock").touch()
    bench.jobs.sweep()
    assert list(parent.iterdir()) == []


async def test_without_memory_disk_or_source_the_reason_is_told(bench: Bench) -> None:
    bench.memory.refusal = InsufficientMemory("It needs 9 GiB.")
    with pytest.raises(InsufficientMemory, match="9 GiB"):
        await bench.begin()
    bench.jobs._limit_bytes = 10**9
    with pytest.raises(InsufficientDisk, match=r"about 4\.2 GiB .* allows 953\.7 MiB"):
        await bench.begin()
    bench.library.all.clear()
    with pytest.raises(ModelNotFound):
        await bench.begin()
    assert bench.converter.requests == []


async def test_the_end_of_the_server_ends_what_runs_and_what_is_held_back(bench: Bench) -> None:
    await stopped(await bench.begun())
    await bench.jobs.close()
    assert (bench.converter.cancelled, bench.memory.ended) == (1, 1)
