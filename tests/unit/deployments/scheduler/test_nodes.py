"""Machines of a cluster have budgets of their own."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from core.errors import InsufficientMemory
from core.supervision import Supervisor
from core.units import GIB, MIB
from deployments.decisions import DecisionLog
from deployments.messages import NO_NODE, NodeMemory, Residency, UnloadResult
from deployments.scheduler.formats import UsageReport
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.nodes import Ledgers, ledger_holding, ledger_of, residency_of
from scheduler.state import HostState, KeepRules, LoadPlan

FAR = NodeMemory("far", 4 * GIB)
SMALL, LARGE = (LoadPlan(600 * MIB),), (LoadPlan(3 * GIB),)


class Cluster:
    """Two machines, this one with a budget of 1 GiB, whose replicas open what they are told."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.supervisor = Supervisor()
        self.ledgers: Ledgers = {"here": self.make(GIB)}
        self.made.clear()

    def of(self, node: NodeMemory) -> Ledger:
        return ledger_of(self.ledgers, node, "here", self.make)

    def holding(self, model_id: str) -> Ledger:
        ledger = ledger_holding(self.ledgers, model_id)
        assert ledger is not None
        return ledger

    def make(self, budget_bytes: int) -> Ledger:
        self.made.append(budget_bytes)
        node = "here" if budget_bytes == GIB else "far"

        async def open_(model_id: str, plan: LoadPlan) -> Residency:
            del plan
            return Residency(model_id, "gguf", f"replica-{node}", node, 2048, 0.0)

        async def close(residency: Residency) -> UnloadResult:
            del residency
            return UnloadResult()

        async def report(known: object) -> UsageReport:
            del known
            return UsageReport()

        state = HostState(budget_bytes)
        return Ledger(state, open_, close, report, DecisionLog(), self.supervisor)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.supervisor.cancel()


async def acquire(
    cluster: Cluster, model_id: str, plans: tuple[LoadPlan, ...], node: NodeMemory = NO_NODE
) -> Residency:
    ledger = ledger_holding(cluster.ledgers, model_id) or cluster.of(node)
    return await ledger.acquire(model_id, plans, 5.0, "interactive")


async def test_what_is_too_large_here_fits_on_the_other_machine(cluster: Cluster) -> None:
    with pytest.raises(InsufficientMemory):
        await acquire(cluster, "large", LARGE)
    found = await acquire(cluster, "large", LARGE, FAR)
    assert found.node_id == "far"
    assert cluster.made == [4 * GIB]
    assert residency_of(cluster.ledgers, "large") == found


async def test_models_of_one_machine_leave_the_others_budget_alone(cluster: Cluster) -> None:
    await acquire(cluster, "large", LARGE, FAR)
    await acquire(cluster, "small", SMALL)
    assert cluster.of(NO_NODE).state.used_bytes == 600 * MIB
    assert cluster.of(FAR).state.used_bytes == 3 * GIB
    ledgers = cluster.ledgers.values()
    held = {one.model_id for ledger in ledgers for one in ledger.residencies}
    assert held == {"large", "small"}
    assert [ledger.loading for ledger in ledgers] == [[], []]


async def test_a_resident_model_is_found_wherever_it_is(cluster: Cluster) -> None:
    first = await acquire(cluster, "large", LARGE, FAR)
    assert await acquire(cluster, "large", LARGE) == first
    holding = cluster.holding("large")
    assert await holding.release("large", "asked for")
    assert residency_of(cluster.ledgers, "large") is None
    assert not await holding.release("large", "asked for")


async def test_one_load_for_all_who_ask_meanwhile(cluster: Cluster) -> None:
    asked = [acquire(cluster, "large", LARGE, FAR) for _ in range(3)]
    assert len(set(await asyncio.gather(*asked))) == 1


async def test_rules_hold_on_machines_that_come_later(cluster: Cluster) -> None:
    for ledger in cluster.ledgers.values():
        ledger.configure("large", KeepRules(is_pinned=True))
    await acquire(cluster, "large", LARGE, FAR)
    assert cluster.of(FAR).state.pinned_bytes == 3 * GIB


async def test_a_new_scheduler_takes_in_what_each_machine_holds(cluster: Cluster) -> None:
    far = Residency("large", "gguf", "replica-far", "far", 2048, 0.0)
    cluster.of(FAR).restore(far, 3 * GIB)
    assert cluster.of(FAR).state.used_bytes == 3 * GIB
    holding = cluster.holding("large")
    holding.forget(far)
    assert [ledger.residencies for ledger in cluster.ledgers.values()] == [[], []]
    await holding.refresh()
    holding.process_ended("replica-far")


async def test_strain_is_that_of_the_own_machine(cluster: Cluster) -> None:
    await acquire(cluster, "large", LARGE, FAR)
    await cluster.of(NO_NODE).set_critical(is_critical=True)
    assert cluster.of(NO_NODE).state.is_critical
    assert not cluster.of(FAR).state.is_critical
