"""Leases memory to jobs such as conversions, in the same ledger as models."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import Unavailable
from core.supervision import attempt
from deployments.messages import MemoryLease, Residency, UnloadResult
from deployments.scheduler.ledger import Closer, Ledger, Opener
from scheduler.state import LoadPlan, ModelUsage

# No model id starts with this: ids have no colon.
_PREFIX = "job:"
# A lease that was not renewed for this long is lost: its process has died.
LEASE_S = 30.0
_LOOK_S = 5.0


@dataclass(slots=True)
class _Held:
    """A lease; `highest_bytes` only grows, because less may still grow again."""

    wanted: MemoryLease
    highest_bytes: int
    renewed_at: float


class Reservations:
    """Memory that other processes' jobs hold for a time.  Belongs to one event loop.

    To the policy a job is a model that cannot be evicted: it waits in the batch class, idle models
    are evicted for it, and requests that need its memory wait for its end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wanted: dict[str, MemoryLease] = {}
        self._held: dict[str, _Held] = {}

    def wrap_open(self, open_: Opener) -> Opener:
        """Wrap `open_`: a job counts as loaded as soon as its memory is granted."""

        async def open_either(name: str, plan: LoadPlan) -> Residency:
            if not name.startswith(_PREFIX):
                return await open_(name, plan)
            if all(name != _entry(wanted) for wanted in self._wanted.values()):
                raise Unavailable(f"{name} has ended.")
            return Residency(name, "", "", "", 0, 0.0)

        return open_either

    def wrap_close(self, close: Closer) -> Closer:
        """Wrap `close`: a job has nothing to unload."""

        async def close_either(residency: Residency) -> UnloadResult:
            return UnloadResult() if residency.is_job else await close(residency)

        return close_either

    def is_used(self, model_id: str) -> bool:
        """Whether a job that has a lease, or waits for one, reads the model."""
        return any(wanted.model_id == model_id for wanted in self._wanted.values())

    async def lease(self, ledger: Ledger, wanted: MemoryLease, timeout_s: float) -> None:
        """Wait for the memory and hold it until it is given back, or not renewed for 30 s.

        A lease that is held already is renewed.  Raises InsufficientMemory for more than the
        budget, QueueFull, and Unavailable after `timeout_s`.
        """
        if self.renew(ledger, wanted.lease_id, 0):
            return
        self._wanted[wanted.lease_id] = wanted
        try:
            await ledger.refresh()
            plans = (LoadPlan(wanted.needed_bytes),)
            await ledger.acquire(_entry(wanted), plans, timeout_s, "batch")
        except BaseException:
            await asyncio.shield(self.give_back(ledger, wanted.lease_id))
            raise
        if wanted.lease_id in self._wanted:
            now = self._clock()
            self._held[wanted.lease_id] = _Held(wanted, wanted.needed_bytes, now)

    def renew(self, ledger: Ledger, lease_id: str, measured_bytes: int) -> bool:
        """Keep a lease, and count measured memory beyond it; False for a lease that is lost."""
        held = self._held.get(lease_id)
        if held is None:
            return False
        held.renewed_at = self._clock()
        held.highest_bytes = max(held.highest_bytes, measured_bytes)
        usage = ModelUsage(_entry(held.wanted), 0.0, 0, measured_bytes=held.highest_bytes)
        ledger.record_usage(usage)
        return True

    async def give_back(self, ledger: Ledger, lease_id: str, reason: str = "it has ended") -> None:
        """Free the memory of a lease, or stop waiting for it; unknown ones are ignored."""
        self._held.pop(lease_id, None)
        wanted = self._wanted.pop(lease_id, None)
        if wanted is not None:
            await ledger.release(_entry(wanted), reason)

    async def expire(self, ledger: Ledger) -> None:
        """Free the memory of leases that nobody renews."""
        now = self._clock()
        lost = [name for name, held in self._held.items() if now - held.renewed_at > LEASE_S]
        for lease_id in lost:
            await self.give_back(ledger, lease_id, f"its lease was not renewed for {LEASE_S:g} s")

    async def run(self, ledger: Ledger) -> None:
        """Look for lost leases until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await attempt(lambda: self.expire(ledger))


def _entry(wanted: MemoryLease) -> str:
    """Return the name of the lease's entry in the ledger; the same for no two leases."""
    return f"{_PREFIX}{wanted.name} ({wanted.lease_id})"
