"""The sequences of an MLX engine, and which of them wait and run."""

from array import array
from dataclasses import dataclass, field

from backends.mlx.batch import RowChoice
from backends.prefixes.reuse import Reuse
from backends.prefixes.store import State
from backends.prefixes.transfer import Restore
from backends.stepper import SequenceSpec, StepOutput


@dataclass(slots=True, eq=False)
class Row:
    """One sequence: `tokens` is the prompt and all tokens handed out; `choice` None is greedy.

    `incoming` is what of its prompt is being restored, `blocks` what has come of it.
    """

    spec: SequenceSpec
    tokens: "array[int]"
    choice: RowChoice | None
    uid: int = -1
    known: int = 0
    prefilled: int = 0
    reuse: Reuse = field(default_factory=Reuse)
    incoming: Restore | None = None
    blocks: list[State] = field(default_factory=list)
    was_restored: bool = False
    is_decoding: bool = False
    is_counted: bool = False

    @property
    def computed(self) -> int:
        """Tokens that its caches hold."""
        return len(self.tokens) if self.is_decoding else self.prefilled

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return len(self.spec.prompt) + self.spec.max_tokens - len(self.tokens)

    def progress(self) -> StepOutput:
        """Return how far its prompt is computed."""
        return StepOutput(
            self.spec.id, None, prefilled=self.prefilled, cached=self.reuse.total, reuse=self.reuse
        )


@dataclass(slots=True)
class Rows:
    """Who waits and who runs.

    `is_crowded` from a preemption until a running row ends: nobody new is admitted.
    """

    waiting: list[Row] = field(default_factory=list)
    running: list[Row] = field(default_factory=list)
    by_id: dict[int, Row] = field(default_factory=dict)
    by_uid: dict[int, Row] = field(default_factory=dict)
    is_crowded: bool = False
