"""Brings together the sources of the router's events: the scheduler, the jobs, the catalog."""

import asyncio
from dataclasses import replace

from core.supervision import Supervisor
from deployments.decisions import DecisionLog
from deployments.router.catalog import CatalogView
from deployments.router.events.jobs import JobEvents
from deployments.router.events.machine import MachineEvents, decision_event
from deployments.router.events.models import ModelEvents
from deployments.router.model_states import ModelStatesWatch
from deployments.serve.handles import Handle
from router.events.hub import KnownState, Publish


class RouterEventSources:
    """Implements `router.events.hub.EventSources`; nothing runs while nobody reads events."""

    def __init__(
        self,
        scheduler: Handle,
        jobs: Handle,
        catalog: CatalogView,
        model_states: ModelStatesWatch,
        log: DecisionLog,
    ) -> None:
        """`log` contains the decisions of this process."""
        self.models = ModelEvents(catalog, model_states)
        self._machine = MachineEvents(scheduler)
        self._jobs = JobEvents(jobs)
        self._log = log

    def run(self, supervisor: Supervisor) -> None:
        """Start the tasks, which wait until `start`."""
        optional = replace(supervisor.policy, is_vital=False)
        supervisor.keep_running("events of models", self.models.run, optional)
        supervisor.keep_running("events of the machine", self._machine.run, optional)
        supervisor.keep_running("events of jobs", self._jobs.run, optional)

    def start(self, publish: Publish) -> None:
        """Begin to follow the sources."""
        self.models.start(publish)
        self._machine.start(publish)
        self._jobs.start(publish)
        self._log.on_record = lambda decision: publish(decision_event(decision))

    def stop(self) -> None:
        """Follow nothing, and forget what is known."""
        self._log.on_record = lambda _: None
        self.models.stop()
        self._machine.stop()
        self._jobs.stop()

    async def refresh(self) -> None:
        """Ask every source now, for 3 s at most; one that does not answer stays as it is known."""
        await asyncio.gather(self.models.refresh(), self._machine.refresh(), self._jobs.refresh())

    def known(self) -> KnownState:
        """Return what is known."""
        problems = {
            "models": self.models.problem(),
            "machine": self._machine.problem(),
            "jobs": self._jobs.problem(),
        }
        return KnownState(
            self.models.known(),
            self._jobs.known(),
            self._machine.memory,
            self._machine.strain,
            {part: problem for part, problem in problems.items() if problem},
        )
