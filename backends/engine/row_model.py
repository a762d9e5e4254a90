"""What a runtime must offer for continuous batching by `backends.engine.row_stepper`."""

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
        """How many rows can be open at the same time."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Number of logits of a row."""
        ...

    @property
    def native_cpu_s(self) -> float:
        """CPU seconds spent in the runtime so far."""
        ...

    def open_row(self, capacity: int) -> int:
        """Return an empty row; `capacity` says how many tokens it may come to hold.

        It is no limit: a row that another sequence takes over may grow further.
        """
        ...

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens to each row's cache; return the logits after each row's last token.

        Shape (len(rows), vocabulary).  Token counts and past lengths may differ.  A row that
        did not get its token keeps its cache as it was.  Raises EngineFailed.
        """
        ...

    def truncate(self, row: int, length: int) -> bool:
        """Keep the first `length` tokens of a row; False where the cache cannot be cut."""
        ...

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Return a new row with the first `length` tokens of another; None where impossible."""
        ...

    def close_row(self, row: int) -> None:
        """Free a row's cache."""
        ...

    def close(self) -> None:
        """Free everything; twice is fine."""
        ...


@runtime_checkable
class PortableRows(Protocol):
    """A `RowModel` whose cache can be copied out, and in again by another process."""

    @property
    def layout(self) -> str | None:
        """What the bytes depend on besides the model's files; None where it is not possible."""
        ...

    def read_tokens(self, row: int, start: int, count: int) -> NDArray[np.uint8]:
        """Return the cache of `count` tokens of a row, one dimension."""
        ...

    def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
        """Append `count` tokens that `read_tokens` gave; False for what is none of this model."""
        ...


class Pieces(Protocol):
    """What the stepper needs of a tokenizer."""

    def is_end(self, token_id: int) -> bool:
        """Whether a token ends the generation."""
        ...

    def piece(self, token_id: int, *, special: bool) -> bytes:
        """Return a token's bytes, a control token's name too with `special`."""
        ...
