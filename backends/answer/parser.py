"""The interface of parsers that split an answer's text into text, reasoning and tool calls."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from core.types import (
    MismatchKind,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)

Piece: TypeAlias = TextDelta | ReasoningDelta | ToolCallDelta


class OutputParser(Protocol):
    """Splits a model's raw text into answer, reasoning and tool calls; pieces carry no ids."""

    @property
    def is_done(self) -> bool:
        """Whether generation has to end here, as after the one tool call that is allowed."""
        ...

    @property
    def mismatches(self) -> Sequence[MismatchKind]:
        """What was wrong with the tool calls so far."""
        ...

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return what is certain by now."""
        ...

    def flush(self) -> list[Piece]:
        """Return what was held back; the text ends here."""
        ...
