"""Prefix reuse statistics: cached tokens by source, and why the next token was computed."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.match import common_prefix
from core.types import CacheOutcome, MissReason

# Tokens of text shown before and after the point where two prompts diverge.
_SHOWN_TOKENS = 8


@dataclass(slots=True)
class Reuse:
    """One sequence's cached tokens by source; `cells` counts those in the engine's own cache.

    `miss` is why the token after them was computed.  `diverged_at` is where the nearest known
    prompt diverges from this one, and `known` are that prompt's tokens there.
    """

    cells: int = 0
    ram: int = 0
    disk: int = 0
    miss: MissReason | None = None
    diverged_at: int | None = None
    known: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """All cached tokens."""
        return self.cells + self.ram + self.disk

    def only_cells(self, tokens: int) -> None:
        """Attribute all cached tokens to the engine's own cache."""
        self.cells, self.ram, self.disk = tokens, 0, 0

    def outcome(
        self, prompt: Sequence[int], cached: int, text_of: Callable[[int], bytes]
    ) -> CacheOutcome:
        """Return the outcome with texts; `text_of` returns a token's bytes.

        `cached` tokens are at most the prompt's length.
        """
        cells = min(self.cells, cached)
        ram = min(self.ram, cached - cells)
        place = self.diverged_at

        def text(tokens: Iterable[int]) -> str:
            return b"".join(map(text_of, tokens)).decode("utf-8", "replace")

        if place is None:
            return CacheOutcome(cells, ram, cached - cells - ram, self.miss)
        return CacheOutcome(
            cells,
            ram,
            cached - cells - ram,
            self.miss,
            place,
            text(prompt[max(place - _SHOWN_TOKENS, 0) : place]),
            text(self.known),
            text(prompt[place : place + _SHOWN_TOKENS]),
        )


@dataclass(frozen=True, slots=True)
class Nearest:
    """The known prompt with the longest common prefix: its length, and how the prompt continues."""

    shared: int = 0
    known: "array[int]" = field(default_factory=lambda: array("i"))


def nearest(prompt: "array[int]", known: Iterable["array[int]"]) -> Nearest:
    """Return the longest common prefix of `prompt` with `known`, preferring one that ends there."""
    best = Nearest()
    for tokens in known:
        shared = common_prefix(tokens, prompt)
        if shared > best.shared or (shared == best.shared == len(tokens)):
            best = Nearest(shared, tokens[shared : shared + _SHOWN_TOKENS])
    return best


def explain(
    reuse: Reuse, planned: int, prompt: "array[int]", found: Nearest, absent: MissReason
) -> None:
    """Record in `reuse` why only `planned` tokens of `prompt` are reused.

    `absent` is why the state after `planned` tokens is not stored.  Nothing is missing if all
    but the last token is cached, or if a known prompt ends where this one continues.
    """
    reuse.miss, reuse.diverged_at, reuse.known = None, None, ()
    if planned >= len(prompt) - 1:
        return
    # Tokens that are known, but whose state cannot be continued, did not diverge.
    is_elsewhere = planned + BLOCK_TOKENS <= found.shared
    if not found.shared or absent != "no_snapshot" or is_elsewhere:
        reuse.miss = absent
    elif found.known and found.shared < len(prompt):
        reuse.miss, reuse.diverged_at = "diverged", found.shared
        reuse.known = tuple(found.known[:_SHOWN_TOKENS])
    elif planned + 1 < found.shared:
        # The tokens are known, but their state cannot be continued here.
        reuse.miss = absent
