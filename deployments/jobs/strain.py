"""Follows what the scheduler says of the machine's strain, which holds jobs back."""

import asyncio
import logging
from collections.abc import Collection

from catalog.jobs import JobLimits
from core.errors import ImpetusError
from core.supervision import beat
from deployments.messages import ModelStates
from deployments.serve.handles import Handle, call, direct

logger = logging.getLogger(__name__)

# The scheduler answers a long poll within 10 s.
_POLL_LIMIT_S = 15.0
_POLL_PAUSE_S = 1.0
_BACK_OFF_S = 5.0


class StrainWatch:
    """The strain as last published; none before the first answer.  Belongs to one event loop.

    `light` are the kinds of jobs that pause at serious strain only, because they compute little.
    """

    def __init__(self, scheduler: Handle, light: Collection[str]) -> None:
        self._scheduler = direct(scheduler)
        self._light = light
        self.states = ModelStates()

    def limits(self, kinds: Collection[str]) -> JobLimits:
        """Return the limits for jobs of these kinds now."""
        strain = self.states.strain
        return JobLimits(
            held={
                kind: strain
                for kind in kinds
                if strain and (self.states.keeps_cool or kind not in self._light)
            }
        )

    async def run(self) -> None:
        """Ask until cancelled; a scheduler that does not answer leaves the last state valid."""
        while True:
            try:
                async with asyncio.timeout(_POLL_LIMIT_S):
                    found: ModelStates = await call(
                        self._scheduler.model_states.remote(self.states.version)
                    )
            except (TimeoutError, ImpetusError) as problem:
                logger.info("the scheduler did not tell the machine's strain: %r", problem)
                await asyncio.sleep(_BACK_OFF_S)
            else:
                if found.version >= 0:
                    self.states = found
                await asyncio.sleep(_POLL_PAUSE_S)
            beat()
