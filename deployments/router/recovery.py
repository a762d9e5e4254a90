"""Recovers requests whose replica was lost: whether there is another attempt, and its context."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from core.errors import CrashingRequest, EngineFailed, ImpetusError
from deployments.activity import DeathRecords
from deployments.decisions import DecisionLog
from deployments.messages import Attempt, LoadContext, Residency
from deployments.router.crashing import CrashingRequests
from deployments.router.losses import Loss, Losses, loss_of
from deployments.router.model_states import ModelStatesWatch
from deployments.router.suspects import SuspectTurns, Turn
from deployments.router.targets import Targets
from deployments.serve.handles import Handle, ReplicaDied, call

logger = logging.getLogger(__name__)

_REPORT_LIMIT_S = 5.0


class Recovery:
    """Shared by all requests of a router.  Belongs to one event loop."""

    def __init__(
        self,
        scheduler: Handle,
        model_states: ModelStatesWatch,
        targets: Targets,
        deaths: DeathRecords,
        log: DecisionLog,
    ) -> None:
        self._scheduler = scheduler
        self._model_states = model_states
        self._targets = targets
        self._deaths = deaths
        self._log = log
        self._turns = SuspectTurns()
        self.crashing = CrashingRequests()

    async def begin(
        self, model_id: str, request_id: str, context: LoadContext, content: object
    ) -> "RequestRecovery":
        """Return the recovery of one request; `content` is what is computed for it.

        Raises CrashingRequest if the same request ended the model's process before.
        """
        await self.crashing.check(model_id, content)
        return RequestRecovery(self, model_id, request_id, context, content)

    async def loss(
        self, problem: ImpetusError, residency: Residency | None, request_id: str, has_begun: bool
    ) -> Loss:
        """Return what happened to a request; reads the record of the dead process."""
        if not isinstance(problem, ReplicaDied):
            return Loss.MISSING
        if residency is None:
            # It died during the load, for which the scheduler found the cause.
            return Loss.BYSTANDER if problem.is_bystander else Loss.LOAD
        cause = await self._deaths.cause(residency.replica_id)
        return loss_of(cause, residency.model_id, request_id, has_begun=has_begun)

    def forget(self, residency: Residency, *, has_died: bool) -> None:
        """Drop the residency, and with its process all others there."""
        lost = self._model_states.note_died(residency) if has_died else [residency]
        self._model_states.note_lost(residency)
        for one in lost:
            self._targets.forget(one)

    async def turn(self, format_name: str) -> Turn:
        """Wait until no other suspect of the format is prepared or prefilled."""
        return await self._turns.begin(format_name)

    def log_loss(self, model_id: str, loss: Loss, problem: ImpetusError) -> None:
        """Log why a request is sent again; a death is a decision."""
        if loss is Loss.MISSING:
            logger.info("%s is no longer resident there: %s", model_id, problem.message)
            return
        is_own = loss is Loss.OWN
        action = f"send a request to {model_id} once more" if is_own else f"resume {model_id}"
        self._log.record("replica died", action, problem.message)

    async def report_death(self, model_id: str, context: LoadContext) -> None:
        """Report a process's death to the scheduler when no further attempt will."""
        if not context.has_died:
            return
        try:
            async with asyncio.timeout(_REPORT_LIMIT_S):
                await call(self._scheduler.process_died.remote(model_id, context.lost_replica))
        except (TimeoutError, ImpetusError) as problem:
            logger.warning("cannot report a process's death to the scheduler: %r", problem)


class RequestRecovery:
    """The attempts of one request: their ids, their turns, and the end of recovering."""

    def __init__(
        self,
        shared: Recovery,
        model_id: str,
        request_id: str,
        context: LoadContext,
        content: object,
    ) -> None:
        self._shared = shared
        self._model_id = model_id
        self._request_id = request_id
        self._content = content
        self._losses = Losses(model_id)
        self._format = ""
        self._number = 0
        self._turn = Turn()
        self.context = context

    @property
    def attempt_id(self) -> str:
        """The id of the current attempt.

        Late events of an earlier attempt do not reach a later one, as each has an id of its own.
        """
        return f"{self._request_id}.{self._number}"

    def attempt(self, residency: Residency) -> Attempt:
        """Return what the replica is told of the current attempt."""
        return Attempt(self.attempt_id, residency.replica_id, self._losses.is_suspect)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Enter for an attempt; a suspect waits until no other one is computed."""
        if self._losses.is_suspect:
            self._turn = await self._shared.turn(self._format)
        try:
            yield
        finally:
            self._turn.end()

    def note_answer(self) -> None:
        """Note that the answer has begun: the request did not end its process."""
        self._turn.end()

    async def recover(
        self,
        problem: ImpetusError,
        residency: Residency | None,
        *,
        has_begun: bool = False,
        can_resume: bool = True,
    ) -> None:
        """Prepare another attempt; raises the error that ends the request instead.

        `residency` is None if its process died during the load.
        """
        has_died = isinstance(problem, ReplicaDied)
        loss = await self._shared.loss(problem, residency, self.attempt_id, has_begun)
        if residency is not None:
            self._format = residency.format
            self.context = replace(
                self.context,
                lost_replica=residency.replica_id,
                has_died=has_died,
                is_resumed=has_begun,
            )
            self._shared.forget(residency, has_died=has_died)
        end = self._losses.note(loss, problem)
        if isinstance(end, CrashingRequest):
            await self._shared.crashing.note(self._model_id, self._content)
        if end is None and not can_resume:
            end = EngineFailed(problem.message, retry_after_s=2)
        if end is not None:
            await self._shared.report_death(self._model_id, self.context)
            raise end from problem
        self._shared.log_loss(self._model_id, loss, problem)
        self._number += 1
