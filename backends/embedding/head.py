"""Makes the final vectors of an embedding model out of its token vectors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.embedding.folder import EmbeddingSettings
from backends.embedding.inputs import PaddedInputs
from backends.embedding.modules import TensorReader, load_module
from backends.embedding.pooling import pool, unit
from core.errors import BrokenModel


class VectorHead:
    """Pooling and the modules after it, with their weights."""

    def __init__(self, settings: EmbeddingSettings, read_other: TensorReader | None = None) -> None:
        """Read the weights; blocks.  `read_other`: see `load_module`.  Raises BrokenModel."""
        self._settings = settings
        self._steps = [load_module(module, read_other) for module in settings.modules]
        self._width = next((each.width for each in settings.modules if each.width), 0)

    def pool(self, hidden: NDArray[np.floating[Any]], inputs: PaddedInputs) -> NDArray[np.float32]:
        """Return the vectors (b, d) of the rows' token vectors `hidden` (b, t, d)."""
        vectors = pool(hidden, inputs.pooled, self._settings.pooling, inputs.mask)
        if self._width and vectors.shape[1] != self._width:
            raise BrokenModel(
                f"The model's vectors have {vectors.shape[1]} numbers, but its modules take "
                f"{self._width}; download the folder again.",
                param="model",
            )
        for step in self._steps:
            vectors = step(vectors)
        return vectors

    def finish(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """Return vectors (b, d) that the model itself pooled, normalised where it wants it."""
        exact = np.asarray(vectors, np.float32)
        return unit(exact) if self._settings.is_unit else exact
