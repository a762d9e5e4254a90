"""Exports and imports blocks of MLX's KV caches as bytes, layer by layer."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.mlx.model import MlxModel
from backends.prefixes.block_file import BLOCK_TOKENS


class LayerBlocks:
    """Splits the caches of one model into blocks and joins them; engine's thread only."""

    def __init__(self, model: MlxModel) -> None:
        self._shapes = model.cache_shapes
        self._dtypes = model.cache_dtypes

    @property
    def layout(self) -> str | None:
        """What the bytes depend on besides the model's files; None if caches cannot be cut."""
        if not self._shapes:
            return None
        arrays = [f"{s}{d}" for s, d in zip(self._shapes, self._dtypes, strict=True)]
        return f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {BLOCK_TOKENS}, {arrays}"

    def copy(self, layers: Sequence[Any], number: int) -> NDArray[np.uint8]:
        """Return the bytes of one block of these caches."""
        import mlx.core as mx

        start, end = number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS
        parts = []
        for layer in layers:
            for array in (layer.keys, layer.values):
                part = mx.contiguous(array[..., start:end, :])
                parts.append(np.array(part.view(mx.uint8)).ravel())
        return np.concatenate(parts)

    def fits(self, state: NDArray[np.uint8]) -> bool:
        """Whether a block has the size of this model's blocks."""
        sizes = (h * w * d.size for (h, w), d in zip(self._shapes, self._dtypes, strict=True))
        return int(state.nbytes) == BLOCK_TOKENS * int(sum(sizes))

    def join(self, states: Sequence[NDArray[np.uint8]]) -> list[Any]:
        """Return caches of all layers with these blocks, in order from the prompt's start."""
        import mlx.core as mx
        from mlx_lm.models.cache import KVCache

        arrays, offset = [], 0
        for (heads, width), dtype in zip(self._shapes, self._dtypes, strict=True):
            size = heads * BLOCK_TOKENS * width * dtype.size
            shape = (1, heads, BLOCK_TOKENS, width * dtype.size)
            parts = [state[offset : offset + size].reshape(shape) for state in states]
            joined = mx.array(np.concatenate(parts, axis=2)).view(dtype)
            arrays.append(joined)
            offset += size
        layers = []
        for keys, values in zip(arrays[::2], arrays[1::2], strict=True):
            layer = KVCache()
            layer.keys, layer.values = keys, values
            layer.offset = len(states) * BLOCK_TOKENS
            layers.append(layer)
        return layers
