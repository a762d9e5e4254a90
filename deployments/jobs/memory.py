"""Holds memory for a job in the scheduler's ledger, by a lease that ends with this process."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from core.awake_time import AwakeTimeout
from core.errors import ImpetusError, Unavailable
from core.supervision import log_failure
from deployments.messages import MemoryLease
from deployments.serve.handles import Handle, ReplicaDied, call, direct

logger = logging.getLogger(__name__)

# How long the scheduler lets a job wait for memory before the job is tried again later.
WAIT_S = 300.0
_ANSWER_LIMIT_S = 10.0
# Well within the time after which the scheduler takes an unrenewed lease back.
_RENEW_S = 2.0


class MemoryLeases:
    """Leases for jobs; a scheduler that was restarted gives them anew.  For one event loop."""

    def __init__(self, scheduler: Handle) -> None:
        self._scheduler = direct(scheduler)

    @asynccontextmanager
    async def held(self, lease: MemoryLease) -> AsyncIterator[Callable[[int], None]]:
        """Wait for the memory and hold it; yields a callback for measured bytes.

        Raises InsufficientMemory for more than the budget, Unavailable for memory that did not
        become free or a scheduler that does not answer.
        """
        measured_bytes = 0

        def measured(held_bytes: int) -> None:
            nonlocal measured_bytes
            measured_bytes = max(measured_bytes, held_bytes)

        try:
            await self._lease(lease)
            keeping = asyncio.create_task(
                self._keep(lease, lambda: measured_bytes), name=f"lease {lease.lease_id}"
            )
            keeping.add_done_callback(log_failure)
            try:
                yield measured
            finally:
                keeping.cancel()
        finally:
            await asyncio.shield(self._give_back(lease))

    async def _lease(self, lease: MemoryLease) -> None:
        try:
            async with AwakeTimeout(WAIT_S + _ANSWER_LIMIT_S):
                await call(self._scheduler.lease_memory.remote(lease, WAIT_S))
        except (TimeoutError, ReplicaDied) as problem:
            raise Unavailable(
                "The scheduler did not answer the question for memory; it is asked again.",
                retry_after_s=10,
            ) from problem

    async def _keep(self, lease: MemoryLease, measured_bytes: Callable[[], int]) -> None:
        """Renew the lease until cancelled; one that was lost is asked for again."""
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                async with asyncio.timeout(_ANSWER_LIMIT_S):
                    is_known: bool = await call(
                        self._scheduler.renew_memory.remote(lease.lease_id, measured_bytes())
                    )
                if not is_known:
                    await self._lease(lease)
            except (ImpetusError, TimeoutError) as problem:
                logger.info("the memory of %s is not leased for now: %r", lease.name, problem)

    async def _give_back(self, lease: MemoryLease) -> None:
        try:
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                await call(self._scheduler.return_memory.remote(lease.lease_id))
        except (ImpetusError, TimeoutError) as problem:
            logger.info("the lease of %s ends by itself: %r", lease.name, problem)
