"""Work that is no model waits for memory and holds it as a model does."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from core.errors import InsufficientMemory, Unavailable
from core.supervision import Supervisor
from core.units import GIB, MIB
from deployments.decisions import DecisionLog
from deployments.messages import Residency, UnloadResult
from deployments.scheduler.formats import UsageReport
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.reservations import Reservations
from scheduler.state import HostState, LoadPlan

SMALL, HALF, LARGE = 300 * MIB, 600 * MIB, 900 * MIB


class Host:
    """A machine of 1 GiB whose models open and close at once."""

    def __init__(self) -> None:
        self.jobs = Reservations()
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


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()
    yield host
    host.supervisor.cancel()


async def test_it_holds_memory_until_it_ends(host: Host) -> None:
    async with host.jobs.reserve(host.ledger, "x", HALF, 5.0):
        assert host.ledger.state.used_bytes == HALF
        # It takes no requests, and no replica is asked about it.
        assert host.ledger.residencies == []
        await host.ledger.refresh()
        assert host.asked == []
    assert host.ledger.state.used_bytes == 0
    assert host.ledger.counts.loads == 0


async def test_a_measurement_counts_beyond_what_was_foreseen(host: Host) -> None:
    async with host.jobs.reserve(host.ledger, "x", HALF, 5.0) as measured:
        measured(SMALL)
        assert host.ledger.state.used_bytes == HALF
        measured(LARGE)
        measured(SMALL)
        assert host.ledger.state.used_bytes == LARGE


async def test_an_idle_model_gives_way(host: Host) -> None:
    await host.want("idle", HALF)
    async with host.jobs.reserve(host.ledger, "x", LARGE, 20.0):
        assert host.closed == ["idle"]


async def test_a_model_waits_for_its_end(host: Host) -> None:
    async with host.jobs.reserve(host.ledger, "x", HALF, 5.0):
        wanted = asyncio.ensure_future(host.want("m", LARGE))
        # Longer than the patience after which busy models are drained.
        await asyncio.sleep(host.ledger.state.limits.patience_s + 0.5)
        assert not wanted.done()
        assert host.ledger.state.used_bytes == HALF
    assert (await wanted).model_id == "m"
    assert host.ledger.state.used_bytes == LARGE


async def test_it_is_refused_where_it_can_never_fit(host: Host) -> None:
    with pytest.raises(InsufficientMemory, match="job:x needs 2"):
        async with host.jobs.reserve(host.ledger, "x", 2 * GIB, 5.0):
            pass
    assert host.ledger.state.used_bytes == 0


async def test_it_waits_no_longer_than_it_said(host: Host) -> None:
    async with host.jobs.reserve(host.ledger, "x", HALF, 5.0):
        with pytest.raises(Unavailable):
            async with host.jobs.reserve(host.ledger, "y", HALF, 0.2):
                pass
    assert host.ledger.state.used_bytes == 0


async def test_one_that_left_while_it_waited_holds_nothing(host: Host) -> None:
    async def hold() -> None:
        async with host.jobs.reserve(host.ledger, "y", HALF, 60.0):
            pass

    async with host.jobs.reserve(host.ledger, "x", HALF, 5.0):
        waiting = asyncio.ensure_future(hold())
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert host.ledger.state.used_bytes == 0
    assert host.ledger.state.waiting == ()
