"""The sequences of a row stepper, and which of them wait, run and are kept."""

from array import array
from dataclasses import dataclass, field

from backends.planned import PlannedRow
from backends.sampling import RowSampler


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
