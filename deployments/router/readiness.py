"""Decides whether the server is ready: whether a request that arrives now would be answered."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from core.errors import ImpetusError
from deployments.router.model_states import ModelStatesWatch
from deployments.serve.handles import Handle, call, direct

logger = logging.getLogger(__name__)

# Both questions fit into the 2 s that the launcher waits for an answer.
_ASK_LIMIT_S = 1.0
_REFRESH_LIMIT_S = 0.5
# Callers within this time share an answer, so that a flood of them costs one question.
_SHARED_S = 0.5


class Readiness:
    """Implements `router.services.Health` by asking every part that a request needs.

    `checks` are local: each returns a sentence that says what is wrong, or nothing.  The scheduler
    is asked last, because only it can take long: 1.5 s at most.
    """

    def __init__(
        self,
        scheduler: Handle,
        checks: Sequence[Callable[[], str]],
        model_states: ModelStatesWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = direct(scheduler)
        self._checks = checks
        self._model_states = model_states
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._reason = ""

    async def not_ready_because(self) -> str:
        """Return why a request would not be answered; empty if it would be."""
        async with self._lock:
            if self._clock() - self._asked_at >= _SHARED_S:
                self._reason = (
                    self._local_reason()
                    or await self._scheduler_reason()
                    or await self._states_reason()
                )
                self._asked_at = self._clock()
            return self._reason

    def _local_reason(self) -> str:
        for check in self._checks:
            try:
                if reason := check():
                    return reason
            except ImpetusError as problem:
                return problem.message
            except Exception as problem:
                logger.exception("a check of readiness failed")
                return f"A check of readiness failed: {type(problem).__name__}."
        return ""

    async def _states_reason(self) -> str:
        """Return why the model states are outdated although the scheduler answers."""
        states = self._model_states
        if states is None or not states.problem():
            return ""
        # After a start the next poll may be seconds away.
        with suppress(TimeoutError):
            async with asyncio.timeout(_REFRESH_LIMIT_S):
                await states.refresh()
        return states.problem()

    async def _scheduler_reason(self) -> str:
        try:
            async with asyncio.timeout(_ASK_LIMIT_S):
                return str(await call(self._scheduler.not_ready_because.remote()))
        except TimeoutError:
            return f"The scheduler did not answer within {_ASK_LIMIT_S:g} s."
        except ImpetusError as problem:
            return f"The scheduler does not answer: {problem.message}"
        except Exception as problem:
            # Serve's own errors while it replaces the process.
            return f"The scheduler does not answer ({type(problem).__name__})."
