"""One sequence of an MLX engine, with its sampler and its restored blocks."""

from dataclasses import dataclass, field

from backends.engine.rows import Row
from backends.mlx.batch import RowChoice
from backends.mlx.scored_prompt import ScoredPrompt
from backends.prefixes.store import State


@dataclass(slots=True, eq=False)
class MlxRow(Row):
    """One sequence; its slot is an mlx-lm uid, and `choice` None means greedy.

    mlx-lm computes one token ahead: once a row decodes, its caches hold all of `tokens`, and
    `past` is no longer updated.  `known` prompt tokens were cached when it started; `blocks`
    are restored before that.  `scored` computes a prompt whose log-probabilities are wanted.
    """

    choice: RowChoice | None
    known: int = 0
    blocks: list[State] = field(default_factory=list)
    was_restored: bool = False
    is_decoding: bool = False
    scored: ScoredPrompt | None = None

    @property
    def computed(self) -> int:
        """Tokens that its caches hold."""
        return len(self.tokens) if self.is_decoding else self.past
