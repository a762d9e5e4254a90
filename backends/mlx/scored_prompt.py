"""Computes a prompt outside mlx-lm's batch, which gives no logits of a prompt's own tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.mlx.metal import computing


class ScoredPrompt:
    """The caches of one prompt, and the logits of each piece that is added to them."""

    def __init__(self, model: Any) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._model = model
        self.layers: list[Any] = make_prompt_cache(model)
        self.length = 0

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; return the logits after each, (len(tokens), vocabulary)."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        with computing(), mx.stream(generation_stream):
            logits = self._model(mx.array([list(tokens)]), cache=self.layers)
            found = np.array(logits[0].astype(mx.float32))
            # Unevaluated caches would keep the logits' inputs alive.
            mx.eval([layer.state for layer in self.layers])
        self.length += len(tokens)
        return found
