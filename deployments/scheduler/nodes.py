"""Looks up memory ledgers: there is one per machine of the cluster, in a dict by node id."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from deployments.messages import NodeMemory, Residency
from deployments.scheduler.ledger import Ledger

# By node id; the scheduler's own machine is always among them.
Ledgers: TypeAlias = dict[str, Ledger]


def ledger_of(
    ledgers: Ledgers, node: NodeMemory, own_node_id: str, make: Callable[[int], Ledger]
) -> Ledger:
    """Return the ledger of `node`, made with the models' settings when the node is new.

    A node without an id is the scheduler's own.
    """
    node_id = node.node_id or own_node_id
    if node_id not in ledgers:
        ledgers[node_id] = make(node.budget_bytes)
        for model_id, rules in ledgers[own_node_id].state.settings:
            ledgers[node_id].configure(model_id, rules)
    return ledgers[node_id]


def ledger_holding(ledgers: Mapping[str, Ledger], model_id: str) -> Ledger | None:
    """Return the ledger of the machine that holds or loads the model; None where none does."""
    for ledger in ledgers.values():
        if ledger.state.resident(model_id) or ledger.state.is_loading(model_id):
            return ledger
    return None


def residency_of(ledgers: Mapping[str, Ledger], model_id: str) -> Residency | None:
    """Return where the model takes requests; None where it does not."""
    ledger = ledger_holding(ledgers, model_id)
    return None if ledger is None else ledger.residency(model_id)
