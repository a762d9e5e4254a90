"""One memory ledger for each machine of the cluster; the policy knows of one machine only."""

import asyncio
from collections.abc import Callable, Iterator

from deployments.messages import NO_NODE, NodeMemory, Residency
from deployments.scheduler.ledger import Ledger
from scheduler.state import KeepRules, LoadPlan, Priority


class NodeLedgers:
    """The ledgers of all machines, asked as if they were one.  Belongs to one event loop.

    `local` is that of the scheduler's own machine; another's is made when its first replica tells
    what it has.
    """

    def __init__(self, local: Ledger, node_id: str, make: Callable[[int], Ledger]) -> None:
        self._local = local
        self._node_id = node_id
        self._make = make
        self._others: dict[str, Ledger] = {}
        self._rules: dict[str, KeepRules] = {}

    def of(self, node: NodeMemory) -> Ledger:
        """Return the machine's ledger; the local one for a machine that nobody named."""
        if node.node_id in ("", self._node_id):
            return self._local
        ledger = self._others.get(node.node_id)
        if ledger is None:
            ledger = self._others[node.node_id] = self._make(node.budget_bytes)
            for model_id, rules in self._rules.items():
                ledger.configure(model_id, rules)
        return ledger

    def _all(self) -> Iterator[Ledger]:
        yield self._local
        yield from self._others.values()

    def _holding(self, model_id: str) -> Ledger:
        """Return the ledger of the machine that holds or opens the model, else the local one."""
        for ledger in self._all():
            if ledger.state.resident(model_id) or ledger.state.is_loading(model_id):
                return ledger
        return self._local

    @property
    def residencies(self) -> list[Residency]:
        """The models that take requests, on all machines."""
        return [one for ledger in self._all() for one in ledger.residencies]

    @property
    def loading(self) -> list[str]:
        """The ids of the models that are being opened."""
        return [model_id for ledger in self._all() for model_id in ledger.loading]

    def residency(self, model_id: str) -> Residency | None:
        """Return where the model takes requests."""
        return self._holding(model_id).residency(model_id)

    async def acquire(
        self,
        model_id: str,
        plans: tuple[LoadPlan, ...],
        timeout_s: float,
        priority: Priority,
        *,
        is_resumed: bool = False,
        node: NodeMemory = NO_NODE,
    ) -> Residency:
        """Return where the model is resident, opened on `node` where it is not; see `Ledger`."""
        holding = self._holding(model_id)
        is_there = holding.state.resident(model_id) or holding.state.is_loading(model_id)
        ledger = holding if is_there else self.of(node)
        return await ledger.acquire(model_id, plans, timeout_s, priority, is_resumed=is_resumed)

    async def release(self, model_id: str, reason: str) -> bool:
        """Unload a model and wait until it is gone; False where it is not resident."""
        return await self._holding(model_id).release(model_id, reason)

    def restore(self, residency: Residency, size_bytes: int, node: NodeMemory) -> None:
        """Take in a model that a replica on `node` was found to hold."""
        self.of(node).restore(residency, size_bytes)

    def forget(self, residency: Residency) -> None:
        """Take out a model whose process is gone."""
        self._holding(residency.model_id).forget(residency)

    def process_ended(self, process: str) -> None:
        """Take out a process, with all that it kept."""
        for ledger in self._all():
            ledger.process_ended(process)

    def configure(self, model_id: str, rules: KeepRules) -> None:
        """Keep a model by these rules, wherever it is loaded."""
        self._rules[model_id] = rules
        for ledger in self._all():
            ledger.configure(model_id, rules)

    async def strain(self, *, is_critical: bool) -> None:
        """Unload what is idle on the scheduler's own machine, whose sensors are read."""
        await self._local.strain(is_critical=is_critical)

    async def refresh(self) -> None:
        """Ask the replicas of all machines how their models are used."""
        await asyncio.gather(*(ledger.refresh() for ledger in self._all()))

    def cancel(self) -> None:
        """End what runs."""
        for ledger in self._all():
            ledger.cancel()
