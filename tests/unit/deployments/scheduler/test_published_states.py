"""Routers wait for a change of what is resident, loading or at fault, and are told of each."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import BrokenModel
from core.settings import Settings
from deployments.messages import LoadContext, ModelStates, Residency
from deployments.scheduler.deployment import SchedulerReplica
from deployments.scheduler.published_states import PublishedStates
from tests.unit.deployments.scheduler.scheduling import A, B, Replica, started

pytestmark = pytest.mark.usefixtures("inspection")


class Router:
    """Follows the scheduler's states as a router does."""

    def __init__(self, scheduler: SchedulerReplica) -> None:
        self.scheduler = scheduler
        self.states = ModelStates()

    async def next(self) -> ModelStates:
        self.states = await self.scheduler.model_states(self.states.version)
        return self.states

    async def until(self, resident: set[str], loading: set[str] | None = None) -> None:
        while self.resident != resident or set(self.states.loading) != (loading or set()):
            known = self.states
            assert (await self.next()).version != known.version

    @property
    def resident(self) -> set[str]:
        return {one.model_id for one in self.states.residencies}


@pytest.fixture
async def router(scheduler: SchedulerReplica) -> Router:
    router = Router(scheduler)
    assert not (await router.next()).residencies
    return router


async def waiting(router: Router) -> "asyncio.Task[ModelStates]":
    """Return a call that waits for a change."""
    call = asyncio.ensure_future(router.next())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not call.done()
    return call


async def test_a_load_is_told_when_it_begins_and_when_it_ends(
    router: Router, scheduler: SchedulerReplica
) -> None:
    call = await waiting(router)
    load = asyncio.ensure_future(scheduler.ensure_loaded(A))
    assert (await call).loading == (A,)
    residency = await load
    assert (await router.next()).residencies == (residency,)
    assert not router.states.loading


async def test_a_model_that_makes_room_is_not_resident_from_the_moment_it_drains(
    router: Router, scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    await router.until({A})
    replica.gate.clear()
    load = asyncio.ensure_future(scheduler.ensure_loaded(B))
    await router.until(set())
    assert replica.held == [A]
    replica.gate.set()
    await load
    await router.until({B})


async def test_an_unload_is_told(router: Router, scheduler: SchedulerReplica) -> None:
    await scheduler.ensure_loaded(A)
    await router.until({A})
    call = await waiting(router)
    assert await scheduler.unload(A)
    assert (await call).residencies == ()


async def test_a_process_found_gone_is_told(
    router: Router, scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    await router.until({A})
    call = await waiting(router)
    replica.held.clear()
    replica.name = "another"
    await scheduler._ledger.refresh()
    assert (await call).residencies == ()


async def test_a_death_that_a_router_tells_of_is_told_to_the_others(
    router: Router, scheduler: SchedulerReplica, replica: Replica
) -> None:
    await scheduler.ensure_loaded(A)
    await router.until({A})
    call = await waiting(router)
    replica.held.clear()
    await scheduler.process_died(A, "replica")
    assert (await call).residencies == ()


async def test_an_idle_process_that_ended_is_found_by_the_next_call(
    tmp_path: Path, replica: Replica
) -> None:
    (tmp_path / "models").mkdir()
    settings = Settings(home=tmp_path, starters=False, formats=["echo"], threads=1)
    running = {"echo"}

    async def deployments() -> frozenset[str]:
        return frozenset(running)

    handles: Any = {"echo": replica.handle}
    scheduler = SchedulerReplica(settings, handles, deployments, replica.existing)
    await scheduler.model_states()
    await scheduler.ensure_loaded("echo@echo")
    states = await scheduler.model_states()
    assert [one.model_id for one in states.residencies] == ["echo@echo"]
    running.clear()
    assert (await scheduler.model_states(states.version)).residencies == ()
    scheduler.__del__()
    await asyncio.gather(scheduler._background, return_exceptions=True)


async def test_faults_and_their_end_are_told(
    router: Router, scheduler: SchedulerReplica, replica: Replica
) -> None:
    replica.failure = BrokenModel("damaged")
    call = await waiting(router)
    assert isinstance(await scheduler.ensure_loaded(A), BrokenModel)
    await call
    await router.until(set())
    assert router.states.faults[A].reason == "damaged"
    call = await waiting(router)
    replica.failure = None
    await scheduler.ensure_loaded(A, LoadContext(is_retry=True))
    assert not (await call).faults


async def test_strain_is_told(tmp_path: Path, replica: Replica) -> None:
    state = tmp_path / "thermal"
    state.write_text("nominal")
    async with started(tmp_path, replica, thermal_file=state) as scheduler:
        router = Router(scheduler)
        await router.next()
        call = await waiting(router)
        state.write_text("serious")
        for later in (1000.0, 2000.0):
            scheduler._thermal._clock = lambda later=later: time.monotonic() + later  # type: ignore[misc]
            await scheduler._thermal.poll()
        states = await call
        assert (states.keeps_cool, states.strain) == (True, "the machine is hot (serious)")
        state.write_text("nominal")
        # The next reading is cool, which has not lasted yet.
        await scheduler._thermal.poll()
        assert (await scheduler.model_states()).strain == "the machine recovers (serious)"


async def test_many_routers_wait_at_once(router: Router, scheduler: SchedulerReplica) -> None:
    routers = [Router(scheduler) for _ in range(20)]
    for one in routers:
        await one.next()
    calls = [await waiting(one) for one in routers]
    await scheduler.ensure_loaded(A)
    found = await asyncio.gather(*calls)
    assert all(states.version != router.states.version for states in found)


async def test_a_call_without_a_known_version_returns_at_once(
    router: Router, scheduler: SchedulerReplica
) -> None:
    assert await scheduler.model_states() == router.states


async def test_a_restarted_scheduler_waits_until_it_knows_and_repeats_no_version(
    router: Router, scheduler: SchedulerReplica, replica: Replica
) -> None:
    residency: Any = await scheduler.ensure_loaded(A)
    await router.until({A})
    replica.found.append(residency)
    handles: Any = {"gguf": replica.handle}
    again = SchedulerReplica(scheduler._settings, handles, _gguf_runs, replica.existing)
    router.scheduler = again
    known = router.states
    states = await router.next()
    assert await again.is_ready()
    assert states.residencies == known.residencies
    assert states.version not in (known.version, -1)
    again.__del__()
    await asyncio.gather(again._background, return_exceptions=True)


async def _gguf_runs() -> frozenset[str]:
    return frozenset({"gguf"})


class Source:
    """States that a test changes, of which time may change one."""

    def __init__(self) -> None:
        self.states = ModelStates()
        self.expires_in_s: float | None = None
        self.reads = 0
        self.published = PublishedStates(self.read, lambda: self.expires_in_s)

    def read(self) -> ModelStates:
        self.reads += 1
        return self.states


async def test_a_wait_ends_unchanged_after_its_limit() -> None:
    source = Source()
    known = source.published.current()
    assert await source.published.wait(known.version, 0.02) == known
    assert source.reads <= 4


async def test_a_wake_without_a_change_goes_on_waiting() -> None:
    source = Source()
    known = source.published.current()
    call = asyncio.ensure_future(source.published.wait(known.version, 60.0))
    for _ in range(3):
        await asyncio.sleep(0)
        source.published.notify()
    await asyncio.sleep(0)
    assert not call.done()
    source.states = replace(known, loading=("m",))
    source.published.notify()
    assert (await call).version == known.version + 1


async def test_what_time_changes_is_told_without_a_notice() -> None:
    source = Source()
    known = source.published.current()
    source.expires_in_s = 0.01
    call = asyncio.ensure_future(source.published.wait(known.version, 60.0))
    await asyncio.sleep(0)
    source.states = ModelStates(residencies=(Residency("m", "gguf", "r", "n", 1, 0.0),))
    assert (await call).residencies
