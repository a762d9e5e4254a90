"""The sequences of a GGUF engine, and which of them wait and run."""

from dataclasses import dataclass, field

from backends.engine.rows import PlannedRow
from backends.gguf.sampling import SequenceSampler


@dataclass(slots=True, eq=False)
class Row(PlannedRow):
    """One sequence in `slot`, -1 while it has none; `run` of its tokens are in the batch."""

    sampler: SequenceSampler
    slot: int = -1
    leader: "Row | None" = None
    shared: int = 0
    output: int = -1
    run: int = 0

    def note(self, *, cells: int = 0, ram: int = 0) -> None:
        """Count what its prompt was given, unless that is told already."""
        if not self.is_counted:
            self.reuse.cells, self.reuse.ram, self.reuse.disk = cells, ram, 0


@dataclass(slots=True)
class Counters:
    """What the stepper has done."""

    steps: int = 0
    preemptions: int = 0
    native_cpu_s: float = 0.0


@dataclass(slots=True)
class Queues:
    """Who waits and who runs.

    `is_crowded` from a preemption until a running row ends: nobody new is admitted.
    """

    waiting: list[Row] = field(default_factory=list)
    running: list[Row] = field(default_factory=list)
    by_id: dict[int, Row] = field(default_factory=dict)
    is_crowded: bool = False

    def clear(self) -> None:
        """Forget all rows."""
        self.waiting.clear()
        self.running.clear()
        self.by_id.clear()
        self.is_crowded = False
