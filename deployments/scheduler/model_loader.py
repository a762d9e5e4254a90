"""Loads models on replicas, and records loads that fail."""

from collections.abc import Awaitable, Callable

from core.errors import InsufficientMemory, ModelFileChanged, ModelFileMissing
from deployments.messages import Residency
from deployments.scheduler.faults import Faults
from deployments.scheduler.formats import FormatClients
from deployments.scheduler.load_plans import LoadPlanner
from deployments.scheduler.lookup import ModelLookup
from deployments.serve.handles import ReplicaDied
from scheduler.state import LoadPlan


class ModelLoader:
    """Performs what the policy decided.  Belongs to one event loop.

    `rescan` scans the model folders, `process_died` takes a process that ended during
    a load, and returns whether the loaded model is charged with that.
    """

    def __init__(
        self,
        lookup: ModelLookup,
        planner: LoadPlanner,
        clients: FormatClients,
        faults: Faults,
        rescan: Callable[[], Awaitable[None]],
        process_died: Callable[[str, str], Awaitable[bool]],
    ) -> None:
        self._lookup = lookup
        self._planner = planner
        self._clients = clients
        self._faults = faults
        self._rescan = rescan
        self._process_died = process_died

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
        except (ModelFileMissing, ModelFileChanged):
            await self._rescan()
            # A file that is refused now says why; one that is sound is loaded by the next request.
            await self._lookup.loadable(model_id)
            raise
        except ReplicaDied as problem:
            lost = await self._clients.lost_processes(name, processes)
            charged = [await self._process_died(model_id, process) for process in lost]
            problem.is_bystander = bool(charged) and not any(charged)
            raise
        except InsufficientMemory:
            raise
        except Exception as problem:
            self._faults.record_failure(model_id, record.fingerprint, problem)
            raise
        self._faults.record_load(model_id)
        return residency
