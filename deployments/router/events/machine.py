"""Publishes the scheduler's memory ledger, what strains the machine, and decisions."""

import time
from typing import Any

from deployments.messages import Decision, MachineState
from deployments.router.events.changes import memory_of, strain_of
from deployments.router.events.polling import PolledSource
from deployments.serve.handles import Handle, direct
from router.events.hub import Publish
from router.events.messages import (
    DecisionEvent,
    MemoryEvent,
    MemoryView,
    StrainEvent,
    StrainView,
)

# So that there is at most one event of each kind a second.
PAUSE_S = 1.0


class MachineEvents(PolledSource[MachineState]):
    """The scheduler's machine; see `PolledSource`."""

    def __init__(self, scheduler: Handle, pause_s: float = PAUSE_S) -> None:
        super().__init__("The scheduler", pause_s)
        self._scheduler = direct(scheduler)
        self._decision = 0
        self.memory: MemoryView | None = None
        self.strain: StrainView | None = None

    def _ask(self, version: int, limit_s: float) -> Any:
        return self._scheduler.machine_state.remote(version, self._decision, limit_s)

    def _version_of(self, answer: MachineState) -> int:
        return answer.version

    def _apply(self, answer: MachineState, publish: Publish | None) -> None:
        memory, strain = memory_of(answer), strain_of(answer)
        has_other = (memory != self.memory, strain != self.strain)
        self.memory, self.strain, self._decision = memory, strain, answer.decision_number
        if publish is None:
            return
        for decision in answer.decisions:
            publish(decision_event(decision))
        if has_other[0]:
            publish(MemoryEvent(at=time.time(), memory=memory), subject="memory")
        if has_other[1]:
            publish(StrainEvent(at=time.time(), thermal=strain), subject="thermal")

    def _forget(self) -> None:
        self.memory = self.strain = None
        self._decision = 0


def decision_event(decision: Decision) -> DecisionEvent:
    """Return a decision as an event."""
    return DecisionEvent(
        at=decision.at, event=decision.event, action=decision.action, reason=decision.reason[:1000]
    )
