"""The interface of a runtime that `backends.engine.row_stepper` batches: rows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RowInput:
    """Tokens to append to one row."""

    row: int
    tokens: Sequence[int]


class RowModel(Protocol):
    """Weights and a KV cache of rows; used from the engine's thread only."""

    @property
    def max_rows(self) -> int:
        """Rows that can be open at the same time."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Number of logits of a row."""
        ...

    @property
    def native_cpu_s(self) -> float:
        """CPU seconds that the runtime has used so far."""
        ...

    def open_row(self, capacity: int) -> int:
        """Return an empty row; `capacity` is the number of tokens expected at its end.

        This is a hint, not a limit: a row that another sequence takes over may grow further.
        """
        ...

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens to each row's cache; return the logits after each row's last token.

        Shape (len(rows), vocabulary).  Token counts and past lengths may differ.  Rows that
        are not listed keep their cache.  Raises EngineFailed.
        """
        ...

    def truncate(self, row: int, length: int) -> bool:
        """Cut a row to its first `length` tokens; False if the cache cannot be cut."""
        ...

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Return a new row with the first `length` tokens of another; None if unsupported."""
        ...

    def close_row(self, row: int) -> None:
        """Free a row's cache."""
        ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...


@runtime_checkable
class PortableRows(Protocol):
    """A `RowModel` whose cache can be exported, and imported by another process."""

    @property
    def layout(self) -> str | None:
        """What the bytes depend on besides the model's files; None if export is unsupported."""
        ...

    def read_tokens(self, row: int, start: int, count: int) -> NDArray[np.uint8]:
        """Return the cache of `count` tokens of a row as a one-dimensional array."""
        ...

    def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
        """Append `count` tokens from `read_tokens`; False if they are not of this model."""
        ...


class Pieces(Protocol):
    """The part of a tokenizer that a stepper uses."""

    def is_end(self, token_id: int) -> bool:
        """Whether a token ends the generation."""
        ...

    def piece(self, token_id: int, *, special: bool) -> bytes:
        """Return a token's bytes; with `special`, control tokens give their name."""
        ...
