"""What the router knows of the scheduler's mind without asking for every request."""

import asyncio
import logging

from core.errors import ImpetusError
from deployments.messages import ModelStates
from deployments.serve.handles import Handle, call, direct

logger = logging.getLogger(__name__)

_POLL_S = 5.0
_LIMIT_S = 2.0


class ModelStatesWatch:
    """The last known model_states, asked for at intervals.  Belongs to one event loop.

    A scheduler that does not answer leaves it as it was.
    """

    def __init__(self, scheduler: Handle, poll_s: float = _POLL_S) -> None:
        self._scheduler = direct(scheduler)
        self._poll_s = poll_s
        self.current = ModelStates()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to ask, on the running loop."""
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()

    async def refresh(self) -> ModelStates:
        """Ask now; return what is known then."""
        try:
            async with asyncio.timeout(_LIMIT_S):
                self.current = await call(self._scheduler.model_states.remote())
        except (TimeoutError, ImpetusError) as problem:
            logger.info("the scheduler does not say how models stand: %r", problem)
        return self.current

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except Exception:
                logger.exception("asking the scheduler how models stand failed")
