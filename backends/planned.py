"""What the steppers that compute prompts in planned chunks and copy blocks out have in common."""

from array import array
from dataclasses import dataclass, field
from typing import Any

from backends.prefill import PrefillPlanner
from backends.reuse import Reuse
from backends.snapshot_flow import Restore, SnapshotFlow
from backends.stepper import SequenceSpec, StepOutput


@dataclass(slots=True, eq=False)
class PlannedRow:
    """One sequence: `tokens` is the prompt and all chosen tokens, `past` of them are computed.

    `incoming` is what of its prompt is being restored; nothing is computed for it meanwhile.
    """

    spec: SequenceSpec
    tokens: "array[int]"
    past: int = field(default=0, kw_only=True)
    reuse: Reuse = field(default_factory=Reuse, kw_only=True)
    incoming: Restore | None = field(default=None, kw_only=True)
    is_counted: bool = field(default=False, kw_only=True)

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.tokens) - self.past

    def stop_restoring(self) -> None:
        """Take no more of what is being restored."""
        if self.incoming is not None:
            self.incoming.cancel()
            self.incoming = None

    def progress(self) -> StepOutput:
        """Return how far its prompt is computed."""
        return StepOutput(
            self.spec.id, None, prefilled=self.past, cached=self.reuse.total, reuse=self.reuse
        )


class PlannedStepper:
    """The part of a stepper that obeys `backends.limits` and does `backends.stepper`."""

    _planner: PrefillPlanner
    _flow: SnapshotFlow[Any]

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        """Bound the prompt tokens of a step; see `backends.limits.PrefillLimited`."""
        self._planner.limit(chunk_tokens)

    @property
    def has_chores(self) -> bool:
        """See `backends.stepper.HasChores`."""
        return self._flow.has_chores

    def do_chore(self) -> None:
        """Copy a block of what was computed out of the engine."""
        self._flow.do_chore()
