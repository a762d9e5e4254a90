"""Caches the model states that the scheduler publishes: residency, faults, thermal policy."""

import asyncio
import logging
import time
from collections.abc import Callable
from itertools import count

from core.errors import ImpetusError
from core.supervision import Supervisor
from deployments.messages import ModelStates, Residency
from deployments.serve.handles import Handle, call, direct

logger = logging.getLogger(__name__)

# The scheduler answers a long poll within 10 s; later than this it counts as unreachable.
_POLL_LIMIT_S = 15.0
_REFRESH_LIMIT_S = 2.0
# Between two polls: changes that come together cost one call.
_POLL_PAUSE_S = 0.05
_FIRST_BACK_OFF_S = 0.5
_LONGEST_BACK_OFF_S = 10.0
# Two long polls and the longest pause fit into it.
_FRESH_S = 40.0


class ModelStatesWatch:
    """The last published model states, corrected by what this router learned since.

    One long poll is open at a time once started.  A scheduler that does not answer leaves the last
    known states valid.  `on_change` is called after every change and every answer.  Belongs to one
    event loop.
    """

    def __init__(self, scheduler: Handle) -> None:
        self._scheduler = direct(scheduler)
        self.on_change: Callable[[], None] = lambda: None
        self.current = ModelStates()
        # By model id; others only read it.  A plain attribute, since every request looks here.
        self.residencies: dict[str, Residency] = {}
        # Numbers the calls to the scheduler and the news from elsewhere in the order they happen.
        self._order = count(1)
        self._asked_last = 0
        # Loads and losses that no answer to a later call has confirmed yet.
        self._loaded: dict[str, int] = {}
        self._lost: dict[str, tuple[int, Residency]] = {}
        self._task: asyncio.Task[None] | None = None
        self._answered_at: float | None = None

    @property
    def resident_formats(self) -> frozenset[str]:
        """The formats that hold a model."""
        return frozenset(residency.format for residency in self.residencies.values())

    def note_loaded(self, residency: Residency) -> None:
        """Add what `ensure_loaded` returned; states asked for before this do not undo it."""
        self.residencies[residency.model_id] = residency
        self._loaded[residency.model_id] = next(self._order)
        self._lost.pop(residency.model_id, None)
        self.on_change()

    def note_lost(self, residency: Residency) -> None:
        """Remove a residency that its replica denied or died with; states that name it are old."""
        model_id = residency.model_id
        self._lost[model_id] = (next(self._order), residency)
        known = self.residencies.get(model_id)
        if known is not None and known.is_same_load(residency):
            del self.residencies[model_id]
            self._loaded.pop(model_id, None)
        self.on_change()

    def note_died(self, residency: Residency) -> list[Residency]:
        """Remove all residencies of the process that held `residency`; return them."""
        lost = [one for one in self.residencies.values() if one.replica_id == residency.replica_id]
        for one in lost:
            self.note_lost(one)
        return [*lost, residency]

    def start(self, supervisor: Supervisor | None = None) -> None:
        """Start polling on the running loop."""
        supervisor = supervisor or Supervisor()
        self._task = supervisor.keep_running("model states", self._run)

    def problem(self) -> str:
        """Return why the known states may be outdated; empty while the scheduler answers."""
        if self._answered_at is None:
            return "The scheduler has not published the model states yet."
        age_s = time.monotonic() - self._answered_at
        if age_s > _FRESH_S:
            return f"The scheduler has not published the model states for {age_s:.0f} s."
        return ""

    def stop(self) -> None:
        """Cancel the open poll and stop."""
        if self._task is not None:
            self._task.cancel()

    async def refresh(self) -> ModelStates:
        """Ask the scheduler now, for 2 s at most; return the last known states."""
        await self._ask(-1, _REFRESH_LIMIT_S)
        return self.current

    async def _run(self) -> None:
        back_off_s = _FIRST_BACK_OFF_S
        while True:
            # Loads that no answer confirmed yet are looked at without waiting for a change.
            known_version = -1 if self._loaded else self.current.version
            try:
                has_answered = await self._ask(known_version, _POLL_LIMIT_S)
            except Exception:
                logger.exception("polling the scheduler's model states failed")
                has_answered = False
            await asyncio.sleep(_POLL_PAUSE_S if has_answered else back_off_s)
            back_off_s = (
                _FIRST_BACK_OFF_S if has_answered else min(2 * back_off_s, _LONGEST_BACK_OFF_S)
            )

    async def _ask(self, known_version: int, limit_s: float) -> bool:
        """Ask for states other than `known_version`; return whether the scheduler knew them."""
        asked = next(self._order)
        try:
            async with asyncio.timeout(limit_s):
                states: ModelStates = await call(self._scheduler.model_states.remote(known_version))
        except (TimeoutError, ImpetusError) as problem:
            logger.info("the scheduler did not answer with the model states: %r", problem)
            return False
        if states.version < 0:
            return False
        self._answered_at = time.monotonic()
        # Of two calls that overlap, the answer to the earlier one may arrive last.
        if asked > self._asked_last or states.version > self.current.version:
            self._asked_last = max(asked, self._asked_last)
            self._apply(states, asked)
        return True

    def _apply(self, states: ModelStates, asked: int) -> None:
        """Take over published states, except for what happened after they were asked for."""
        residencies = {one.model_id: one for one in states.residencies if not one.is_job}
        for model_id, loaded in list(self._loaded.items()):
            if loaded > asked:
                residencies[model_id] = self.residencies[model_id]
            else:
                del self._loaded[model_id]
        for model_id, (lost, residency) in list(self._lost.items()):
            published = residencies.get(model_id)
            if published is not None and published.is_same_load(residency):
                del residencies[model_id]
            elif lost < asked:
                del self._lost[model_id]
        self.residencies = residencies
        self.current = states
        self.on_change()
