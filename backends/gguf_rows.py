"""The sequences of a GGUF engine, and which of them wait and run."""

from array import array
from dataclasses import dataclass, field

from backends.base import SequenceSpec, StepOutput
from backends.gguf_sampling import SequenceSampler
from backends.reuse import Reuse
from backends.snapshot_flow import Restore


@dataclass(slots=True, eq=False)
class Row:
    """One sequence: `tokens` is the prompt and all chosen tokens, `past` of them are in KV.

    `incoming` is what of its prompt is being restored; nothing is computed for it meanwhile.
    """

    spec: SequenceSpec
    tokens: "array[int]"
    sampler: SequenceSampler
    slot: int = -1
    past: int = 0
    reuse: Reuse = field(default_factory=Reuse)
    incoming: Restore | None = None
    is_counted: bool = False
    leader: "Row | None" = None
    shared: int = 0
    output: int = -1
    run: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.tokens) - self.past

    def note(self, *, cells: int = 0, ram: int = 0) -> None:
        """Count what its prompt was given, unless that is told already."""
        if not self.is_counted:
            self.reuse.cells, self.reuse.ram, self.reuse.disk = cells, ram, 0

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
