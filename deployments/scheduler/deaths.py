"""Forgets dead replica processes and charges their deaths to the models they were computing."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from catalog.changes import describe_changes
from deployments.activity import DeathCause, DeathRecords
from deployments.decisions import DecisionLog
from deployments.messages import Residency
from deployments.scheduler.faults import Faults
from deployments.scheduler.formats import FormatClients
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.lookup import ModelLookup

logger = logging.getLogger(__name__)

_KEPT_DEATHS = 32
_CHECK_S = 5.0


@dataclass(frozen=True, slots=True)
class _Death:
    """A process that is gone: what it died of, None if unknown, and its last lines on stderr."""

    cause: DeathCause | None
    stderr_tail: str


class ProcessDeaths:
    """Belongs to one event loop.

    `release` removes a model that its replica no longer serves, after asking the replica.
    `replicas` returns the ids of the replicas that exist.
    """

    def __init__(
        self,
        records: DeathRecords,
        ledgers: Callable[[], Iterable[Ledger]],
        release: Callable[[Residency], Awaitable[None]],
        lookup: ModelLookup,
        clients: FormatClients,
        faults: Faults,
        log: DecisionLog,
        replicas: Callable[[], Awaitable[frozenset[str]]],
    ) -> None:
        self._records = records
        self._ledgers = ledgers
        self._release = release
        self._lookup = lookup
        self._clients = clients
        self._faults = faults
        self._log = log
        self._replicas = replicas
        self._examined: dict[str, asyncio.Task[_Death]] = {}
        self._checked_at = 0.0

    async def died(self, model_id: str, process: str) -> bool:
        """Forget a process, and charge its death to the models that it was computing.

        `model_id` had a request or a load there; it is charged where nothing is known of the work.
        Returns whether it is charged.
        """
        death = await self._examine(process)
        charged = {model_id} if death.cause is None else death.cause.models
        for one in sorted(charged):
            await self._charge(one, process, death.stderr_tail)
        if death.cause is not None and death.cause.is_confirmed:
            self._faults.confirm_deaths(charged)
        return model_id in charged

    async def forget_gone(self) -> None:
        """Forget the processes of loaded models that Serve no longer lists.

        Raises what `replicas` does.
        """
        now = time.monotonic()
        known = {
            one.replica_id: one
            for ledger in self._ledgers()
            for one in ledger.residencies
            if one.replica_id
        }
        if not known or now - self._checked_at < _CHECK_S:
            return
        self._checked_at = now
        existing = await self._replicas()
        for process in known.keys() - existing:
            logger.warning("Serve no longer lists %s of %s", process, known[process].model_id)
            await self._examine(process)

    async def _examine(self, process: str) -> _Death:
        """Examine a death once, however many requests report it."""
        task = self._examined.get(process)
        if task is None:
            task = self._examined[process] = asyncio.ensure_future(self._examine_now(process))
        try:
            death = await asyncio.shield(task)
        except Exception:
            self._examined.pop(process, None)
            raise
        # A process that was only out of reach may die later.
        if death.cause is None:
            self._examined.pop(process, None)
        else:
            # A recovery may have restored what the process held before it died.
            self._drop(process)
        for old in list(self._examined)[:-_KEPT_DEATHS]:
            del self._examined[old]
        return death

    async def _examine_now(self, process: str) -> _Death:
        cause = await self._records.cause(process)
        if cause is None:
            for residency in self._residencies(process):
                await self._release(residency)
        else:
            self._drop(process)
        for ledger in self._ledgers():
            ledger.process_ended(process)
        return _Death(cause, await self._clients.stderr_tail(process))

    def _residencies(self, process: str) -> list[Residency]:
        found = (one for ledger in self._ledgers() for one in ledger.residencies)
        return [one for one in found if one.replica_id == process]

    def _drop(self, process: str) -> None:
        for ledger in self._ledgers():
            for residency in ledger.residencies:
                if residency.replica_id == process:
                    ledger.forget(residency)

    async def _charge(self, model_id: str, process: str, stderr_tail: str) -> None:
        """Record a death of a model; the third quarantines it."""
        record = await self._lookup.find(model_id)
        if record is None:
            return
        change = await asyncio.to_thread(describe_changes, record.info.files, record.signatures)
        if self._faults.record_death(model_id, record.fingerprint, process, stderr_tail, change):
            reason = self._faults.current()[model_id].reason
            self._log.record("process died", f"quarantine {model_id}", reason)
