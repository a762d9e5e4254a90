"""Reserves memory for jobs such as conversions, in the same ledger as models."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from core.errors import Unavailable
from deployments.messages import Residency, UnloadResult
from deployments.scheduler.ledger import Closer, Ledger, Opener
from scheduler.state import LoadPlan, ModelUsage

# No model id starts with this: ids have no colon.
_PREFIX = "job:"


class Reservations:
    """Jobs that hold memory until they end by themselves.  Belongs to one event loop.

    To the policy a job is a model that cannot be evicted: it waits in the batch class, idle models
    are evicted for it, and requests that need its memory wait for its end.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def wrap_open(self, open_: Opener) -> Opener:
        """Wrap `open_`: a job counts as loaded as soon as its memory is granted."""

        async def open_either(name: str, plan: LoadPlan) -> Residency:
            if not _is_job(name):
                return await open_(name, plan)
            if name not in self._names:
                raise Unavailable(f"{name} has ended.")
            return Residency(name, "", "", "", 0, 0.0)

        return open_either

    def wrap_close(self, close: Closer) -> Closer:
        """Wrap `close`: a job has nothing to unload."""

        async def close_either(residency: Residency) -> UnloadResult:
            return UnloadResult() if residency.is_job else await close(residency)

        return close_either

    @asynccontextmanager
    async def reserve(
        self, ledger: Ledger, name: str, needed_bytes: int, timeout_s: float
    ) -> AsyncIterator[Callable[[int], None]]:
        """Wait for the memory and reserve it; yields a callback for measured bytes.

        A measurement counts only above `needed_bytes`: less may still grow.  Raises
        InsufficientMemory, QueueFull, and Unavailable after `timeout_s`.
        """
        job = f"{_PREFIX}{name}"
        self._names.add(job)
        highest = needed_bytes

        def measured(held_bytes: int) -> None:
            nonlocal highest
            highest = max(highest, held_bytes)
            ledger.record_usage(ModelUsage(job, 0.0, 0, measured_bytes=highest))

        try:
            plans = (LoadPlan(needed_bytes),)
            await ledger.refresh()
            await ledger.acquire(job, plans, timeout_s, "batch")
            yield measured
        finally:
            self._names.discard(job)
            await asyncio.shield(ledger.release(job, "it has ended"))


def _is_job(name: str) -> bool:
    return name.startswith(_PREFIX)
