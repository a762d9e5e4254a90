"""Finds out what changed between two states, and names it; pure."""

from collections.abc import Mapping

from deployments.messages import MachineState, ModelStates, Residency
from router.events.messages import (
    MemoryHolder,
    MemoryView,
    ModelChange,
    ModelStateName,
    ModelSummary,
    StrainView,
)

_LONGEST_REASON = 1000
_BY_STATE: Mapping[ModelStateName, ModelChange] = {
    "arriving": "arriving",
    "loading": "loading",
    "resident": "loaded",
    "unloading": "unloading",
    "failed": "failed",
    "quarantined": "quarantined",
}
_HELD = ("resident", "unloading")


def with_states(
    model: ModelSummary, states: ModelStates, residencies: Mapping[str, Residency]
) -> ModelSummary:
    """Return a model, as the catalog has it, with what the scheduler does with it."""
    residency = residencies.get(model.id)
    if residency is not None:
        return model.model_copy(
            update={"state": "resident", "context_tokens": residency.context_tokens}
        )
    if model.id in states.unloading:
        return model.model_copy(update={"state": "unloading"})
    if model.id in states.loading:
        return model.model_copy(update={"state": "loading"})
    fault = states.faults.get(model.id)
    if fault is not None and model.state == "available":
        state = "quarantined" if fault.is_quarantined else "failed"
        return model.model_copy(update={"state": state, "reason": fault.reason[:_LONGEST_REASON]})
    return model


def change_of(
    old: ModelSummary | None, new: ModelSummary | None, *, is_other_load: bool = False
) -> ModelChange | None:
    """Return what happened to a model; None if nothing did.

    `is_other_load`: it was loaded again since the old state was seen.
    """
    if new is None:
        return None if old is None else "removed"
    if old is None:
        return "arriving" if new.state == "arriving" else "added"
    if old.state != new.state:
        if old.state in _HELD and new.state not in (*_HELD, "failed", "quarantined"):
            # Also of one that is being loaded again: that is told by the next event.
            return "loading" if new.state == "loading" else "unloaded"
        return _BY_STATE.get(new.state, "changed")
    if is_other_load and new.state == "resident":
        return "loaded"
    return None if old == new else "changed"


def memory_of(state: MachineState) -> MemoryView:
    """Return the ledger as events show it."""
    return MemoryView(
        budget_bytes=state.budget_bytes,
        used_bytes=state.used_bytes,
        free_bytes=max(min(state.budget_bytes, state.limit_bytes) - state.used_bytes, 0),
        kept_bytes=state.kept_bytes,
        holders=tuple(
            MemoryHolder(
                id=one.name, kind=one.kind, size_bytes=one.size_bytes, is_pinned=one.is_pinned
            )
            for one in state.uses
        ),
    )


def strain_of(state: MachineState) -> StrainView:
    """Return what strains the machine as events show it."""
    return StrainView(
        state=state.thermal,
        heat=state.heat,
        memory_pressure=state.memory_pressure,
        is_low_power=state.is_low_power,
        battery=state.battery,
        is_throttled=state.is_throttled,
        admits_loads=state.admits,
        jobs_pause_because=state.strain,
    )
