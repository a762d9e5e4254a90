"""One embedding request inside its engine."""

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from core.errors import ImpetusError
from core.types import Embeddings

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class EmbeddingJob:
    """One request; `left` are (tokens, index) of what is not computed, the shortest first.

    One that is not due yet, by the monotonic clock, lets others go first.  `begun_at` is when the
    first batch with some of it began.
    """

    inputs: Sequence[str | Sequence[int]]
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[Embeddings]"
    due_at: float = 0.0
    token_lists: list[list[int]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    vectors: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    is_over: bool = False
    begun_at: float = math.inf

    def result(self) -> Embeddings:
        """Return the vectors in the order of the inputs."""
        rows = [self.vectors[index] for index in range(len(self.token_lists))]
        vectors = np.stack(rows) if rows else np.empty((0, 0), np.float32)
        return Embeddings(vectors, sum(map(len, self.token_lists)))

    def resolve(self, outcome: Embeddings | ImpetusError) -> None:
        """Hand the result to the waiting task; callable from any thread."""
        self.is_over = True

        def settle() -> None:
            if self.done.done():
                return
            if isinstance(outcome, Embeddings):
                self.done.set_result(outcome)
            else:
                self.done.set_exception(outcome)

        try:
            self.loop.call_soon_threadsafe(settle)
        except RuntimeError:
            logger.debug("the loop of an embedding request is closed")
