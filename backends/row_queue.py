"""The sequences of a row stepper, and which of them wait, run and are kept."""

from array import array
from dataclasses import dataclass, field

from backends.base import SequenceSpec, StepOutput
from backends.reuse import Reuse
from backends.sampling import RowSampler
from backends.snapshot_flow import Restore


@dataclass(slots=True, eq=False)
class Row:
    """One sequence: `tokens` is the prompt and all chosen tokens, `past` of them are computed.

    `incoming` is what of its prompt is being restored; nothing is computed for it meanwhile.
    """

    spec: SequenceSpec
    tokens: "array[int]"
    sampler: RowSampler
    row: int = -1
    past: int = 0
    reuse: Reuse = field(default_factory=Reuse)
    incoming: Restore | None = None
    is_counted: bool = False
    leader: "Row | None" = None
    shared: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.tokens) - self.past

    @property
    def capacity(self) -> int:
        """Tokens that it may come to hold."""
        return len(self.spec.prompt) + self.spec.max_tokens

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
