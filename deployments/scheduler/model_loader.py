"""Loads models on replicas, and records loads that fail and processes that die of them."""

from collections.abc import Awaitable, Callable

from core.errors import InsufficientMemory, ModelFileMissing
from deployments.decisions import DecisionLog
from deployments.messages import Residency
from deployments.scheduler.faults import Faults
from deployments.scheduler.formats import FormatClients
from deployments.scheduler.load_plans import LoadPlanner
from deployments.scheduler.lookup import ModelLookup
from deployments.serve.handles import ReplicaDied
from scheduler.state import LoadPlan


class ModelLoader:
    """Performs what the policy decided.  Belongs to one event loop.

    `rescan` scans the model folders, `process_ended` tells the ledgers of a process that is gone.
    """

    def __init__(
        self,
        lookup: ModelLookup,
        planner: LoadPlanner,
        clients: FormatClients,
        faults: Faults,
        log: DecisionLog,
        rescan: Callable[[], Awaitable[None]],
        process_ended: Callable[[str], None],
    ) -> None:
        self._lookup = lookup
        self._planner = planner
        self._clients = clients
        self._faults = faults
        self._log = log
        self._rescan = rescan
        self._process_ended = process_ended

    async def load(self, budget_bytes: int, model_id: str, plan: LoadPlan) -> Residency:
        """Let a replica load the model as planned.  Raises what the replica does.

        The catalog is read again, from SQLite: the load may have waited for memory.
        """
        record = await self._lookup.loadable(model_id)
        request = self._planner.load_request(record, plan, budget_bytes)
        name = record.info.format
        # The load's facts were asked for right before it was decided, the processes among them.
        processes = self._clients.known_processes(name)
        try:
            residency = await self._clients.open(request)
        except ModelFileMissing:
            await self._rescan()
            raise
        except ReplicaDied:
            for process in await self._clients.lost_processes(name, processes):
                await self.record_death(model_id, process)
            raise
        except InsufficientMemory:
            raise
        except Exception as problem:
            self._faults.record_failure(model_id, record.fingerprint, problem)
            raise
        self._faults.record_load(model_id)
        return residency

    async def record_death(self, model_id: str, process: str) -> None:
        """Record a process that died while it used the model; the third quarantines the model."""
        self._process_ended(process)
        record = await self._lookup.find(model_id)
        stderr_tail = await self._clients.stderr_tail(process)
        if record is not None and self._faults.record_death(
            model_id, record.fingerprint, process, stderr_tail
        ):
            reason = self._faults.current()[model_id].reason
            self._log.record("process died", f"quarantine {model_id}", reason)
