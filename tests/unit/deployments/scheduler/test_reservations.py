"""Work that is no model waits for memory and holds it as a model does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from core.errors import InsufficientMemory, Unavailable
from core.supervision import Supervisor
from core.units import GIB, MIB
from deployments.decisions import DecisionLog
from deployments.messages import MemoryLease, Residency, UnloadResult
from deployments.scheduler.formats import UsageReport
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.reservations import LEASE_S, Reservations
from scheduler.state import HostState, LoadPlan

SMALL, HALF, LARGE = 300 * MIB, 600 * MIB, 900 * MIB


class Host:
    """A machine of 1 GiB whose models open and close at once."""

    def __init__(self) -> None:
        self.now = 100.0
        self.jobs = Reservations(lambda: self.now)
        self.closed: list[str] = []
        self.asked: list[str] = []
        self.supervisor = Supervisor()
        self.ledger = Ledger(
            HostState(GIB),
            self.jobs.wrap_open(self.open),
            self.jobs.wrap_close(self.close),
            self.report,
            DecisionLog(),
            self.supervisor,
        )

    async def open(self, model_id: str, plan: LoadPlan) -> Residency:
        del plan
        return Residency(model_id, "gguf", "replica", "node", 2048, 0.0)

    async def close(self, residency: Residency) -> UnloadResult:
        self.closed.append(residency.model_id)
        return UnloadResult()

    async def report(self, known: object) -> UsageReport:
        assert isinstance(known, list)
        self.asked += [one.model_id for one in known]
        return UsageReport()

    async def want(self, model_id: str, needed_bytes: int) -> Residency:
        return await self.ledger.acquire(model_id, (LoadPlan(needed_bytes),), 20.0, "interactive")

    async def lease(self, name: str, needed_bytes: int, timeout_s: float = 5.0) -> None:
        await self.jobs.lease(self.ledger, lease_of(name, needed_bytes), timeout_s)

    @asynccontextmanager
    async def leased(self, name: str, needed_bytes: int) -> AsyncIterator[None]:
        await self.lease(name, needed_bytes)
        yield
        await self.jobs.give_back(self.ledger, name)


def lease_of(name: str, needed_bytes: int) -> MemoryLease:
    return MemoryLease(name, f"conversion of {name}", f"{name}@gguf-f16", needed_bytes)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()
    yield host
    host.supervisor.cancel()


async def test_it_holds_memory_until_it_is_given_back(host: Host) -> None:
    async with host.leased("x", HALF):
        assert host.ledger.state.used_bytes == HALF
        assert host.jobs.is_used("x@gguf-f16")
        assert not host.jobs.is_used("y@gguf-f16")
        # It takes no requests, and no replica is asked about it.
        assert host.ledger.residencies == []
        await host.ledger.refresh()
        assert host.asked == []
    assert host.ledger.state.used_bytes == 0
    assert host.ledger.counts.loads == 0
    assert not host.jobs.is_used("x@gguf-f16")


async def test_a_measurement_counts_beyond_what_was_foreseen(host: Host) -> None:
    async with host.leased("x", HALF):
        assert host.jobs.renew(host.ledger, "x", SMALL)
        assert host.ledger.state.used_bytes == HALF
        assert host.jobs.renew(host.ledger, "x", LARGE)
        assert host.jobs.renew(host.ledger, "x", SMALL)
        assert host.ledger.state.used_bytes == LARGE


async def test_a_lease_that_nobody_renews_is_lost(host: Host) -> None:
    await host.lease("x", HALF)
    await host.lease("y", SMALL)
    host.now += LEASE_S
    assert host.jobs.renew(host.ledger, "x", 0)
    await host.jobs.expire(host.ledger)
    assert host.ledger.state.used_bytes == HALF + SMALL
    host.now += 1.0
    await host.jobs.expire(host.ledger)
    assert host.ledger.state.used_bytes == HALF
    assert not host.jobs.renew(host.ledger, "y", 0)
    # The job goes on, and gets its memory again.
    await host.lease("y", SMALL)
    assert host.ledger.state.used_bytes == HALF + SMALL


async def test_a_new_process_takes_over_the_lease_of_its_job(host: Host) -> None:
    await host.lease("x", LARGE)
    await host.lease("x", LARGE)
    assert host.ledger.state.used_bytes == LARGE
    await host.jobs.give_back(host.ledger, "x")
    assert host.ledger.state.used_bytes == 0


async def test_an_idle_model_gives_way(host: Host) -> None:
    await host.want("idle", HALF)
    async with host.leased("x", LARGE):
        assert host.closed == ["idle"]


async def test_a_model_waits_for_its_end(host: Host) -> None:
    async with host.leased("x", HALF):
        wanted = asyncio.ensure_future(host.want("m", LARGE))
        # Longer than the patience after which busy models are drained.
        await asyncio.sleep(host.ledger.state.limits.patience_s + 0.5)
        assert not wanted.done()
        assert host.ledger.state.used_bytes == HALF
    assert (await wanted).model_id == "m"
    assert host.ledger.state.used_bytes == LARGE


async def test_it_is_refused_where_it_can_never_fit(host: Host) -> None:
    with pytest.raises(InsufficientMemory, match=r"job:conversion of x .* needs 2"):
        await host.lease("x", 2 * GIB)
    assert host.ledger.state.used_bytes == 0
    assert not host.jobs.is_used("x@gguf-f16")


async def test_it_waits_no_longer_than_it_said(host: Host) -> None:
    async with host.leased("x", HALF):
        with pytest.raises(Unavailable):
            await host.lease("y", HALF, 0.2)
    assert host.ledger.state.used_bytes == 0


@pytest.mark.parametrize("is_told", [False, True], ids=["it is cancelled", "it gives up"])
async def test_one_that_left_while_it_waited_holds_nothing(host: Host, *, is_told: bool) -> None:
    async with host.leased("x", HALF):
        waiting = asyncio.ensure_future(host.lease("y", HALF, 60.0))
        await asyncio.sleep(0.05)
        if is_told:
            await host.jobs.give_back(host.ledger, "y")
        else:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    if is_told:
        with pytest.raises(Unavailable, match="has ended"):
            await waiting
    assert host.ledger.state.used_bytes == 0
    assert host.ledger.state.waiting == ()
