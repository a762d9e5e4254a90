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
    """Splits a model's raw text into answer, reasoning and tool calls; pieces have no token ids."""

    @property
    def is_done(self) -> bool:
        """Whether generation has to end here, as after the only allowed tool call."""
        ...

    @property
    def mismatches(self) -> Sequence[MismatchKind]:
        """Problems with the tool calls so far."""
        ...

    def push(self, text: str) -> list[Piece]:
        """Parse the next text; return the pieces that are certain by now."""
        ...

    def flush(self) -> list[Piece]:
        """End the text; return the pieces that were held back."""
        ...
