"""What of a prompt was found computed, from where, and why the token after it was not."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from backends.prefixes.match import common_prefix
from core.types import CacheOutcome, MissReason

# Tokens of text that show where two prompts part.
_SHOWN_TOKENS = 8


@dataclass(slots=True)
class Reuse:
    """One sequence's cached tokens by source; `cells` are those in the engine's own cache.

    `miss` says why the token after them was computed; `diverged_at` where the nearest known
    prompt parts from this one, and `known` are its tokens there.
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
        """Let all cached tokens be from the engine's own cache."""
        self.cells, self.ram, self.disk = tokens, 0, 0

    def outcome(
        self, prompt: Sequence[int], cached: int, text_of: Callable[[int], bytes]
    ) -> CacheOutcome:
        """Return it in words; `cached` is at most the prompt's length, `text_of` a token's text."""
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
    """The known prompt that shares most with another: how much, and how it goes on."""

    shared: int = 0
    known: "array[int]" = field(default_factory=lambda: array("i"))


def nearest(prompt: "array[int]", known: Iterable["array[int]"]) -> Nearest:
    """Return which of these sequences shares most with `prompt`, one that ends there first."""
    best = Nearest()
    for tokens in known:
        shared = common_prefix(tokens, prompt)
        if shared > best.shared or (shared == best.shared == len(tokens)):
            best = Nearest(shared, tokens[shared : shared + _SHOWN_TOKENS])
    return best


def explain(
    reuse: Reuse, planned: int, prompt: "array[int]", found: Nearest, absent: MissReason
) -> None:
    """Note why no more than `planned` tokens of `prompt` are taken from what is known.

    `absent` is the reason where no known prompt begins alike.

    Nothing is missing where all but the last token is cached, or a known prompt ends where
    this one goes on.
    """
    reuse.miss, reuse.diverged_at, reuse.known = None, None, ()
    if planned >= len(prompt) - 1:
        return
    if not found.shared or absent == "evicted":
        reuse.miss = absent
    elif found.known and found.shared < len(prompt):
        reuse.miss, reuse.diverged_at = "diverged", found.shared
        reuse.known = tuple(found.known[:_SHOWN_TOKENS])
    elif planned + 1 < found.shared:
        # It is known, but in a form that cannot be continued here.
        reuse.miss = absent
