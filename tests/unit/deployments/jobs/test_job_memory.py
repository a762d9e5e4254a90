"""Memory of jobs in the scheduler's ledger: held while they run, and asked for again when lost."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from core.errors import InsufficientMemory, Unavailable
from deployments.jobs.memory import WAIT_S, MemoryLeases
from deployments.messages import MemoryLease
from tests.unit.deployments.handles import FakeHandle, FakeMethod, answering
from tests.waiting import wait_until

LEASE = MemoryLease("a1", "conversion of m to mlx-4bit", "m@gguf-f16", 1000)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.jobs.memory._RENEW_S", 0.001)


def scheduler(**answers: Any) -> Any:
    usual = {
        "lease_memory": answering(None),
        "renew_memory": answering(True),
        "return_memory": answering(None),
    }
    return FakeHandle(**{**usual, **answers})


async def test_it_is_renewed_with_what_was_measured_and_given_back() -> None:
    handle = scheduler()
    async with MemoryLeases(handle).held(LEASE) as measured:
        measured(500)
        measured(300)
        await wait_until(lambda: ("a1", 500) in handle.renew_memory.calls, "it is renewed")
        assert handle.lease_memory.calls == [(LEASE, WAIT_S)]
        assert handle.return_memory.calls == []
    assert handle.return_memory.calls == [("a1",)]
    count = len(handle.renew_memory.calls)
    await asyncio.sleep(0.01)
    assert len(handle.renew_memory.calls) == count


async def test_one_that_was_lost_is_asked_for_again_whatever_fails_meanwhile() -> None:
    """The scheduler was restarted: its process is away first, and then knows of no lease."""
    died = RayActorError("it died")
    handle = scheduler(
        renew_memory=answering(True, died, False, True),
        lease_memory=answering(None, Unavailable("It starts."), None),
    )
    async with MemoryLeases(handle).held(LEASE):
        await wait_until(lambda: len(handle.renew_memory.calls) > 5, "it is renewed again")
    assert handle.lease_memory.calls == [(LEASE, WAIT_S)] * 2


@pytest.mark.parametrize(
    ("refusal", "error", "told"),
    [
        (InsufficientMemory("It needs 9 GiB."), InsufficientMemory, "9 GiB"),
        (RayActorError("it died"), Unavailable, "did not answer"),
    ],
)
async def test_without_memory_nothing_begins(
    refusal: Exception, error: type[Exception], told: str
) -> None:
    handle = scheduler(lease_memory=answering(refusal))
    with pytest.raises(error, match=told):
        async with MemoryLeases(handle).held(LEASE):
            pytest.fail("it began")
    assert handle.return_memory.calls == [("a1",)]


async def test_one_that_is_cancelled_while_it_waits_tells_the_scheduler() -> None:
    async def wait(*arguments: Any) -> None:
        del arguments
        await asyncio.sleep(60)

    handle = scheduler()
    handle.lease_memory = FakeMethod(wait)

    async def work() -> None:
        async with MemoryLeases(handle).held(LEASE):
            pytest.fail("it began")

    task = asyncio.ensure_future(work())
    await wait_until(lambda: handle.lease_memory.calls, "it asks")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.lease_memory.responses[0].is_cancelled
    assert handle.return_memory.calls == [("a1",)]
