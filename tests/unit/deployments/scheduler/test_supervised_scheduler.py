"""The scheduler's background tasks: one that fails works again, one that keeps failing is told."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from catalog.models import ScanReport
from catalog.scan.scan import scan as real_scan
from catalog.store import CatalogStore
from core.errors import CatalogNotWritten, ImpetusError, Unavailable
from core.settings import Settings
from core.supervision import RestartPolicy, Supervisor
from core.units import MIB
from deployments.messages import LoadContext, Residency
from deployments.scheduler import recovery, scanning
from deployments.scheduler.deployment import SchedulerReplica
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.publisher import Publisher
from deployments.scheduler.scanning import Scanner
from deployments.scheduler.thermal import ThermalWatch
from tests.gguf_files import llama_gguf
from tests.unit.deployments.handles import FakeMethod
from tests.unit.deployments.scheduler.scheduling import A, B, Replica, gguf_runs
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("inspection", "fast")

FAST = RestartPolicy(first_delay_s=0.001, longest_delay_s=0.002, most_failures=3, least_s=0.0)
TASKS: dict[str, tuple[type, str]] = {
    "publisher": (Publisher, "publish"),
    "thermal watch": (ThermalWatch, "poll"),
    "memory ledger": (Ledger, "_poll"),
}
LOOPS: dict[str, tuple[type, str]] = {
    "folder scans": (Scanner, "run"),
    "publisher": (Publisher, "run"),
    "thermal watch": (ThermalWatch, "run"),
    "memory ledger": (Ledger, "_run"),
}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restart without delays, and repeat without pauses."""
    monkeypatch.setattr("deployments.scheduler.deployment.Supervisor", partial(Supervisor, FAST))
    monkeypatch.setattr(scanning, "_RETRY_S", 0.001)
    monkeypatch.setattr(recovery, "_POLICY", replace(FAST, is_vital=False))
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_put", lambda *_, **__: None)
    monkeypatch.setattr("deployments.scheduler.publisher.PUBLISH_S", 0.001)
    monkeypatch.setattr("deployments.scheduler.thermal.POLL_S", 0.001)
    monkeypatch.setattr(Ledger, "_poll_s", lambda _: 0.001)


class Faulty:
    """Puts a failing method into a class; it works after `failures` calls."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str], failures: float
    ) -> None:
        self.calls = 0
        self.worked = 0
        works: Callable[..., Awaitable[None]] = getattr(*where)

        async def fails(*arguments: Any) -> None:
            self.calls += 1
            if self.calls <= failures:
                raise OSError("the disk is on fire")
            self.worked += 1
            await works(*arguments)

        monkeypatch.setattr(*where, fails)


def settings_of(home: Path, **options: Any) -> Settings:
    (home / "models").mkdir(exist_ok=True)
    return Settings(
        home=home, starters=False, formats=["gguf"], memory_budget=70 * MIB, threads=1, **options
    )


@pytest.fixture
async def start(tmp_path: Path, replica: Replica) -> AsyncIterator[Callable[[], SchedulerReplica]]:
    """Return a function that starts a scheduler over one model."""
    llama_gguf(settings_of(tmp_path).home / "models" / "a-F32.gguf")
    started: list[SchedulerReplica] = []

    def begin(**handles: Any) -> SchedulerReplica:
        formats: Any = {"gguf": replica.handle, **handles}
        started.append(
            SchedulerReplica(settings_of(tmp_path), formats, gguf_runs, replica.existing)
        )
        return started[-1]

    yield begin
    for scheduler in started:
        scheduler.__del__()
        await scheduler._supervisor.stop()


async def until_ready(scheduler: SchedulerReplica) -> None:
    await wait_until(scheduler._recovery.is_done.is_set, "the scheduler is ready")


@pytest.mark.parametrize("where", [*TASKS.values(), *LOOPS.values()])
async def test_a_task_that_raises_once_works_again(
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[[], SchedulerReplica],
    where: tuple[type, str],
) -> None:
    faulty = Faulty(monkeypatch, where, failures=1)
    scheduler = start()
    await until_ready(scheduler)
    await wait_until(lambda: faulty.worked, "it works again")
    await scheduler.check_health()
    assert await scheduler.not_ready_because() == ""
    assert isinstance(await scheduler.ensure_loaded(A), Residency)


@pytest.mark.parametrize(("name", "where"), [*TASKS.items(), *LOOPS.items()])
async def test_a_task_that_always_raises_fails_the_health_check_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[[], SchedulerReplica],
    name: str,
    where: tuple[type, str],
) -> None:
    faulty = Faulty(monkeypatch, where, failures=float("inf"))
    scheduler = start()
    await wait_until(lambda: faulty.calls > 3, "it is tried again and again")
    with pytest.raises(Unavailable, match=f"{name}: OSError: the disk is on fire"):
        await scheduler.check_health()
    if name == "folder scans":
        assert "are being scanned" in await scheduler.not_ready_because()
        return
    await until_ready(scheduler)
    assert name in await scheduler.not_ready_because()
    views = {one.name: one for one in (await scheduler.snapshot()).parts}
    assert views[name].status == "failing"
    assert views[name].failures >= 3


async def test_a_format_that_fails_once_is_asked_again(
    start: Callable[[], SchedulerReplica], replica: Replica
) -> None:
    asked = 0

    async def residencies() -> list[Residency]:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise Unavailable("This model's format cannot be served now.")
        return []

    setattr(replica.handle, "residencies", FakeMethod(residencies))  # noqa: B010
    scheduler = start()
    await until_ready(scheduler)
    assert asked == 3
    assert isinstance(await scheduler.ensure_loaded(A), Residency)


async def test_a_server_whose_only_format_is_dead_says_so_and_goes_on(
    start: Callable[[], SchedulerReplica], replica: Replica
) -> None:
    is_dead = True

    async def residencies() -> list[Residency]:
        if is_dead:
            raise Unavailable("away")
        return []

    setattr(replica.handle, "residencies", FakeMethod(residencies))  # noqa: B010
    scheduler = start()
    await wait_until(lambda: len(replica.handle.residencies.calls) > 5, "it is asked again")
    async with asyncio.timeout(30):
        # Before that it tells that it scans.
        while "gguf (Unavailable: away)" not in await scheduler.not_ready_because():
            await asyncio.sleep(0.005)
    assert not await scheduler.is_ready()
    # Another process of the scheduler would not help.
    await scheduler.check_health()
    is_dead = False
    await until_ready(scheduler)
    assert await scheduler.not_ready_because() == ""


async def test_nothing_is_loaded_before_it_is_known_what_is_resident(
    start: Callable[[], SchedulerReplica], replica: Replica, tmp_path: Path
) -> None:
    may_answer = asyncio.Event()

    async def residencies() -> list[Residency]:
        await may_answer.wait()
        return [Residency(B, "gguf", replica.name, "node", 2048, 0.1)]

    # The budget has room for one of them.
    llama_gguf(tmp_path / "models" / "b-F32.gguf")
    replica.held.append(B)
    setattr(replica.handle, "residencies", FakeMethod(residencies))  # noqa: B010
    scheduler = start()
    await wait_until(lambda: scheduler._scanner.has_scanned, "the folders are scanned")
    loading = asyncio.ensure_future(scheduler.ensure_loaded(A))
    lost = LoadContext(lost_replica="gone", has_died=True)
    resuming = asyncio.ensure_future(scheduler.ensure_loaded(A, lost))
    for _ in range(200):
        await asyncio.sleep(0)
    assert replica.handle.load_model.calls == []
    may_answer.set()
    assert isinstance(await loading, Residency)
    assert isinstance(await resuming, Residency)
    assert replica.held == [A]


async def test_a_request_that_waited_in_vain_for_a_dead_format_is_told_so(
    start: Callable[..., SchedulerReplica], replica: Replica
) -> None:
    async def residencies() -> list[Residency]:
        raise Unavailable("away")

    setattr(replica.handle, "residencies", FakeMethod(residencies))  # noqa: B010
    scheduler = start()
    scheduler._settings = scheduler._settings.model_copy(update={"request_timeout_s": 0.5})
    await wait_until(lambda: len(replica.handle.residencies.calls) > 2, "it is asked again")
    refused: Any = await scheduler.ensure_loaded(A)
    assert isinstance(refused, Unavailable)
    assert "gguf (Unavailable: away)" in refused.message
    assert replica.handle.load_model.calls == []


async def test_one_dead_format_does_not_keep_the_others(
    start: Callable[..., SchedulerReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs() -> list[Residency]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(recovery, "_WAIT_S", 0.01)
    dead = Replica()
    setattr(dead.handle, "residencies", FakeMethod(hangs))  # noqa: B010
    scheduler = start(onnx=dead.handle)
    await until_ready(scheduler)
    assert isinstance(await scheduler.ensure_loaded(A), Residency)


@pytest.mark.parametrize(
    "problem",
    [
        ImpetusError("The catalog could not be written (database or disk is full)."),
        ImpetusError("The catalog could not be read (database is locked)."),
        sqlite3.OperationalError("disk I/O error"),
        MemoryError(),
    ],
)
async def test_errors_of_the_catalog_do_not_end_scanning(
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[[], SchedulerReplica],
    caplog: pytest.LogCaptureFixture,
    problem: Exception,
) -> None:
    failures = 0

    def fails(*arguments: Any, **options: Any) -> Any:
        nonlocal failures
        if failures < 6:
            failures += 1
            raise problem
        return real_scan(*arguments, **options)

    monkeypatch.setattr(scanning, "scan", fails)
    scheduler = start()
    await wait_until(lambda: failures > 3, "scanning failed")
    # Models that are in the catalog are still served: another process would not help.
    await scheduler.check_health()
    await until_ready(scheduler)
    assert caplog.text.count("Traceback") <= 2
    assert isinstance(await scheduler.ensure_loaded(A), Residency)


async def test_a_catalog_that_cannot_be_written_is_served_as_it_is(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[], SchedulerReplica]
) -> None:
    """A full disk at the start: ready with what is known, and written once there is room."""
    is_full = True
    real = CatalogStore.record_scan

    def record(*arguments: Any, **options: Any) -> ScanReport:
        if is_full:
            raise CatalogNotWritten("the disk is full")
        return real(*arguments, **options)

    monkeypatch.setattr(CatalogStore, "record_scan", record)
    scheduler = start()
    await until_ready(scheduler)
    assert await scheduler.not_ready_because() == ""
    assert scheduler._scanner.problem == "the disk is full"
    is_full = False
    await wait_until(lambda: not scheduler._scanner.problem, "the catalog is written")
    assert len(scheduler._store.models()) == 1
