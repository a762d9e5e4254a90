"""One sequence of a GGUF engine, with what the current batch holds of it."""

from dataclasses import dataclass

from backends.engine.rows import Row
from backends.gguf.sampling import SequenceSampler


@dataclass(slots=True, eq=False)
class GgufRow(Row):
    """One sequence; its slot is a llama.cpp sequence id.

    `batched` of its tokens are in the batch; `output` is the index of their logits, -1: none.
    `scored_from` is the batch's index of the first one if all have logits, else -1.
    """

    sampler: SequenceSampler
    output: int = -1
    batched: int = 0
    scored_from: int = -1

    def note_reuse(self, *, cells: int = 0, ram: int = 0) -> None:
        """Set where its cached tokens came from, unless that is final."""
        if not self.is_reuse_final:
            self.reuse.cells, self.reuse.ram, self.reuse.disk = cells, ram, 0
