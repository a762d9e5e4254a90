"""Keeps what a stepper raises outside of a step from ending the engine."""

import logging
from collections.abc import Callable

from backends.base import EngineLoad
from backends.engine.pacing import Pacer
from backends.stepper import HasLimitations, SequenceSpec, StepOutput, Stepper, do_chore, has_chores

logger = logging.getLogger(__name__)


class GuardedStepper:
    """A stepper of which only `add` and `step` raise; used on the engine's thread.

    Chores, counters and limits are left out for good once they have raised: they would raise
    again at every step.  Runtimes in Rust raise a BaseException when they panic, so that is
    caught as well.
    """

    def __init__(self, stepper: Stepper, name: str) -> None:
        """`name` is the model's, for the log."""
        self._stepper = stepper
        self._name = name
        self._left_out: set[str] = set()
        self._stuck: set[int] = set()
        self._counters = EngineLoad()
        self.max_sequences = stepper.max_sequences
        self.limitations = stepper.limitations if isinstance(stepper, HasLimitations) else ()

    def add(self, spec: SequenceSpec) -> None:
        """Accept a sequence; raises what the stepper raises, which then has not accepted it."""
        self._stepper.add(spec)

    def step(self) -> list[StepOutput]:
        """Do one forward pass; raises what the stepper raises."""
        return self._stepper.step()

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; call it again for one that still has outputs.  Idempotent."""
        try:
            self._stepper.remove(sequence_id)
            self._stuck.discard(sequence_id)
        except BaseException:
            if sequence_id not in self._stuck:
                logger.exception("%s: a sequence cannot be removed", self._name)
            self._stuck.add(sequence_id)

    @property
    def has_chores(self) -> bool:
        """Whether there is background work to do."""
        if "chores" in self._left_out:
            return False
        try:
            return has_chores(self._stepper)
        except BaseException:
            self._leave_out("chores")
            return False

    def do_chore(self) -> None:
        """Do one piece of background work, if there is any."""
        self._try("chores", lambda: do_chore(self._stepper))

    def apply_limits(self, pacer: Pacer) -> None:
        """Apply the pacer's limits if they changed."""
        if not pacer.is_applied:
            self._try("limits", lambda: pacer.apply_to(self._stepper))

    def counters(self) -> EngineLoad:
        """Return the stepper's counts, or the last known ones."""
        if "counters" not in self._left_out:
            try:
                self._counters = self._stepper.counters()
            except BaseException:
                self._leave_out("counters")
        return self._counters

    def _try(self, work: str, action: Callable[[], object]) -> None:
        if work in self._left_out:
            return
        try:
            action()
        except BaseException:
            self._leave_out(work)

    def _leave_out(self, work: str) -> None:
        logger.exception("%s: the stepper's %s failed and are left out", self._name, work)
        self._left_out.add(work)

    def close(self) -> None:
        """Free everything; the engine has ended whether that works or not."""
        try:
            self._stepper.close()
        except BaseException:
            logger.exception("%s: the stepper cannot be closed", self._name)
