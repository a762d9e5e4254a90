"""Where a reused prefix may end: anywhere, or in a deterministic engine at a whole prompt piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from backends.prefixes.block_file import BLOCK_TOKENS

Each = TypeVar("Each")


@dataclass(frozen=True, slots=True)
class PieceRule:
    """Whether prompts are computed in fixed pieces, of `tokens` each from a prompt's start.

    Runtimes round otherwise for another number of tokens in a step.  So the keys and values of
    fixed pieces depend on the tokens alone, those of other steps on what was computed when.
    """

    is_fixed: bool = False
    tokens: int = 1

    def whole(self, count: int) -> int:
        """Return how many of the first `count` tokens are in whole pieces; all without a rule."""
        return count - count % self.tokens if self.is_fixed else count

    def kept(self, computed: int, prompt: int) -> int:
        """Return how many computed tokens of a finished sequence a later one may continue.

        All of them; with fixed pieces the whole ones of its prompt, which has `prompt` tokens.
        """
        return self.whole(min(computed, prompt)) if self.is_fixed else computed

    def blocks(self, blocks: Sequence[Each]) -> Sequence[Each]:
        """Return the first of these stored blocks of a prompt, as many as end at a whole piece."""
        count = len(blocks)
        while self.is_fixed and count * BLOCK_TOKENS % self.tokens:
            count -= 1
        return blocks[:count]

    def layout(self, layout: str | None) -> str | None:
        """Return the layout of stored blocks, which fixed pieces share with no others."""
        if layout is None or not self.is_fixed:
            return layout
        return f"{layout}, computed in pieces of {self.tokens}"
