"""The sequences of a stepper: their tokens, computed lengths and prefix restores."""

from array import array
from dataclasses import dataclass, field
from typing import Any

from backends.engine.prefill import PrefillPlanner
from backends.engine.sampling import RowSampler
from backends.prefixes.reuse import Reuse
from backends.prefixes.transfer import Restore, SnapshotFlow
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


@dataclass(slots=True, eq=False)
class Row(PlannedRow):
    """One sequence in `row` of the model, -1 while it has none."""

    sampler: RowSampler
    row: int = -1
    leader: "Row | None" = None
    shared: int = 0

    @property
    def capacity(self) -> int:
        """Tokens that it may come to hold."""
        return len(self.spec.prompt) + self.spec.max_tokens


@dataclass(slots=True, eq=False)
class Kept:
    """A finished sequence whose row stays until somebody needs the room."""

    row: int
    tokens: "array[int]"
    used_at_step: int


@dataclass(slots=True)
class Rows:
    """Who waits and who runs.

    `is_crowded` from a preemption until a running row ends: nobody new is admitted.
    """

    waiting: list[Row] = field(default_factory=list)
    running: list[Row] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    by_id: dict[int, Row] = field(default_factory=dict)
    is_crowded: bool = False

    @property
    def open_count(self) -> int:
        """Rows of the model that are in use."""
        return len(self.running) + len(self.kept)

    def oldest(self) -> Kept:
        """Return the least recently used finished row; there must be one."""
        return min(self.kept, key=lambda kept: kept.used_at_step)

    def known(self) -> list["array[int]"]:
        """Return the tokens of all rows that are computed or being computed."""
        return [*(kept.tokens for kept in self.kept), *(row.tokens for row in self.running)]
