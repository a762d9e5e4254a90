"""Log-probabilities of a prompt's own tokens, reduced from the logits of each computed piece."""

import math
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from backends.engine.row_model import RowInput, RowModel
from backends.engine.sampling import check_finite, token_logprob
from backends.stepper import SequenceSpec
from core.errors import NonFiniteOutput
from core.types import TokenLogprob

# Logits that are held at once: 32 MiB of float32.
_MOST_LOGITS = 1 << 23


@runtime_checkable
class GivesAllLogits(Protocol):
    """A `RowModel` that gives the logits after each token of a piece, from one pass."""

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        """Append tokens to a row; return logits (len(tokens), vocabulary).  Raises EngineFailed."""
        ...


def piece_tokens(vocabulary_size: int) -> int:
    """Return how many tokens may be computed together with the logits of each."""
    return max(_MOST_LOGITS // max(vocabulary_size, 1), 1)


def all_logits(model: RowModel, row: RowInput) -> NDArray[np.float32]:
    """Append tokens to a row; return the logits after each, (len(tokens), vocabulary).

    Models that give only the last logits compute token by token.  Raises EngineFailed.
    """
    if isinstance(model, GivesAllLogits):
        return model.extend_all(row)
    return np.stack([np.array(model.extend([RowInput(row.row, [t])])[0]) for t in row.tokens])


class PromptScores:
    """The log-probabilities of one prompt's tokens; the first one has none, given as NaN.

    Positions are given in order.  One that is known already, as after a preemption, is skipped.
    """

    def __init__(self, spec: SequenceSpec, top: int, piece: Callable[[int], bytes]) -> None:
        """`top` alternatives are kept for each token; `piece` returns a token's bytes."""
        first = spec.prompt[0]
        self._prompt = spec.prompt
        self._top = top
        self._piece = piece
        self._on_logits = spec.on_logits
        self._known = 1
        self._new = [TokenLogprob(first, piece(first), math.nan)]
        self._problem: NonFiniteOutput | None = None

    @classmethod
    def of(cls, spec: SequenceSpec, piece: Callable[[int], bytes]) -> "PromptScores | None":
        """Return the scores of a sequence that asks for them, or None."""
        top = spec.sampling.prompt_logprobs
        return None if top is None else cls(spec, top, piece)

    @property
    def is_complete(self) -> bool:
        """Whether all tokens are known."""
        return self._known >= len(self._prompt)

    def add(self, position: int, logits: NDArray[np.float32]) -> None:
        """Take the logits (vocabulary,) after the prompt's token at `position`."""
        if position + 1 != self._known or self.is_complete or self._problem is not None:
            return
        try:
            check_finite(logits)
        except NonFiniteOutput as problem:
            self._problem = problem
            return
        if self._on_logits is not None:
            self._on_logits(position, logits)
        token_id = self._prompt[self._known]
        top = min(self._top, len(logits))
        self._new.append(token_logprob(logits, token_id, top, self._piece))
        self._known += 1

    def add_piece(self, start: int, logits: Iterable[NDArray[np.float32]]) -> None:
        """Take the logits after each token from position `start` on."""
        for offset, each in enumerate(logits):
            self.add(start + offset, each)

    def take(self) -> tuple[TokenLogprob, ...]:
        """Return what is new since the last call.  Raises NonFiniteOutput once for bad logits."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
        new, self._new = tuple(self._new), []
        return new
