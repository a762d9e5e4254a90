"""Memory for work that is no model: it waits, and is counted, in the ledger as a model is."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from core.errors import Unavailable
from deployments.messages import Residency, UnloadResult
from deployments.scheduler.ledger import Closer, Ledger, Opener
from scheduler.state import LoadPlan, ModelUsage

# No model's id begins so: a colon is no part of one.
_PREFIX = "job:"


class Reservations:
    """Work that holds memory until it ends by itself, such as conversions.  On one event loop.

    To the policy a job is a model that nothing can close: it waits in the batch class, idle models
    give way to it, and whoever needs more than is left beside it waits for its end.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def wrap_open(self, open_: Opener) -> Opener:
        """Return `open_` for models, with jobs being open as soon as their memory is granted."""

        async def open_either(name: str, plan: LoadPlan) -> Residency:
            if not _is_job(name):
                return await open_(name, plan)
            if name not in self._names:
                raise Unavailable(f"{name} has ended.")
            return Residency(name, "", "", "", 0, 0.0)

        return open_either

    def wrap_close(self, close: Closer) -> Closer:
        """Return `close` for models; a job's memory is free when it says so."""

        async def close_either(residency: Residency) -> UnloadResult:
            return UnloadResult() if residency.is_job else await close(residency)

        return close_either

    @asynccontextmanager
    async def reserve(
        self, ledger: Ledger, name: str, needed_bytes: int, timeout_s: float
    ) -> AsyncIterator[Callable[[int], None]]:
        """Wait for the memory and hold it; yields whom to tell what is held by measurement.

        A measurement counts only beyond what was foreseen: less may grow to that.  Raises
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
