"""What bounds a sequence's next token: a grammar, and a sequence's place in it."""

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer must match, in llguidance's Lark; `param` is what asked for it.

    The rules `marker<i>` and `until<i>` of `markers` are the vocabulary's to add: a marker is a
    control token in one and plain text in another.
    """

    grammar: str
    param: str
    markers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpeningCall:
    """A call that an answer may begin with, unmarked.

    `begin` matches the answer's first bytes as soon as it is one, at most `longest` of them; the
    group that took part begins what `constraint` is of.
    """

    begin: "re.Pattern[bytes]"
    constraint: Constraint
    longest: int


class TokenMask(Protocol):
    """One sequence's place in its grammar; used from the engine's thread only."""

    @property
    def problem(self) -> str:
        """Why the answer is not bounded as it was to be; empty while it is."""
        ...

    @property
    def is_active(self) -> bool:
        """Whether `apply` would change anything now."""
        ...

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of tokens that may not come next to -inf; shape (vocabulary,)."""
        ...

    def accept(self, token_id: int) -> None:
        """Move on past the chosen token."""
        ...


class GrammarPlace(TokenMask, Protocol):
    """A place in one grammar, which may be left and gone through again."""

    def restart(self, data: bytes) -> bool:
        """Go back to the grammar's start and past `data`; return whether it allows that."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is satisfied."""
        ...
