"""Types of constrained decoding: grammars, and the per-sequence token masks they produce."""

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar in llguidance's Lark dialect; `param` is the request field that asked for it.

    The compiler adds the rules `marker<i>` and `until<i>` of `markers`, since a marker may be a
    control token in one vocabulary and plain text in another.  A grammar that is not `is_cheap`
    is tried in a limited child process before it is compiled.  With `is_json`, slashes may be
    written as in JSON, and nothing but JSON is bound in any other way.
    """

    grammar: str
    param: str
    markers: tuple[str, ...] = ()
    is_cheap: bool = True
    is_json: bool = False


@dataclass(frozen=True, slots=True)
class BareCallGrammar:
    """Grammar of an unmarked tool call at the start of an answer.

    `pattern` matches the first bytes of the answer, at most `max_bytes`, as soon as they are such
    a call; `constraint` applies from the start of the matched group.
    """

    pattern: "re.Pattern[bytes]"
    constraint: Constraint
    max_bytes: int


class TokenMask(Protocol):
    """Allowed next tokens of one sequence; used from the engine's thread only."""

    @property
    def problem(self) -> str:
        """Why the constraint could not be enforced; empty if it was."""
        ...

    @property
    def is_active(self) -> bool:
        """Whether `apply` would change anything now."""
        ...

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of disallowed tokens to -inf, in place; shape (vocabulary,)."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token."""
        ...


class RestartableMask(TokenMask, Protocol):
    """Token mask of one grammar that can be applied again from its start."""

    def restart(self, data: bytes) -> bool:
        """Restart the grammar and advance by `data`; return whether it accepts that."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is satisfied."""
        ...
