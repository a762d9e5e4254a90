"""An LRU cache of computed prefixes in memory, for MLX models."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.prefixes.match import common_prefix
from backends.prefixes.ram import SMALLEST_PREFIX


@dataclass(slots=True, eq=False)
class KeptLayers:
    """The KV caches of all layers for `tokens`, one sequence; their arrays are immutable."""

    tokens: "array[int]"
    layers: list[Any]
    size_bytes: int
    can_trim: bool
    used: int


class MlxPrefixes:
    """Holds at most `limit_bytes` of caches; used from the engine's thread only."""

    def __init__(self, limit_bytes: int, whole: Callable[[int], int] = lambda count: count) -> None:
        """Of `count` shared tokens the first `whole(count)` are reused."""
        self._limit_bytes = limit_bytes
        self._whole = whole
        self._kept: list[KeptLayers] = []
        self._uses = 0

    @property
    def is_on(self) -> bool:
        """Whether prefixes are kept at all."""
        return self._limit_bytes > 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all kept caches."""
        return sum(kept.size_bytes for kept in self._kept)

    def tokens(self) -> list["array[int]"]:
        """Return the tokens of all prefixes."""
        return [kept.tokens for kept in self._kept]

    def put(self, tokens: "array[int]", layers: list[Any]) -> KeptLayers | None:
        """Keep the caches of `tokens`, in place of shorter ones that they contain.

        Returns None, keeping nothing, if they are too large, too short or already known.
        """
        import mlx.core as mx
        from mlx_lm.models.cache import can_trim_prompt_cache

        size_bytes = sum(layer.nbytes for layer in layers)
        if size_bytes > self._limit_bytes or len(tokens) < SMALLEST_PREFIX:
            return None
        can_trim = can_trim_prompt_cache(layers)
        if can_trim and any(
            kept.can_trim and common_prefix(kept.tokens, tokens) == len(tokens)
            for kept in self._kept
        ):
            return None
        self._kept = [
            kept
            for kept in self._kept
            if not (can_trim or len(kept.tokens) == len(tokens))
            or common_prefix(kept.tokens, tokens) < len(kept.tokens)
        ]
        self._uses += 1
        newest = KeptLayers(tokens, layers, size_bytes, can_trim, self._uses)
        self._kept.append(newest)
        while self.size_bytes > self._limit_bytes:
            self._kept.remove(min(self._kept, key=lambda kept: kept.used))
        # Unevaluated arrays would keep their inputs alive.
        mx.eval([layer.state for layer in layers])
        return newest

    def longest(self, prompt: "array[int]") -> tuple[int, Callable[[], list[Any]]]:
        """Return how many tokens of `prompt` are cached, and a function that makes the caches.

        At least one token is left to compute.  A cache that cannot be cut is used whole or not.
        """
        limit = len(prompt) - 1
        best, best_length = None, SMALLEST_PREFIX - 1
        for kept in self._kept:
            length = self._whole(min(common_prefix(kept.tokens, prompt), limit))
            if length < len(kept.tokens) and not kept.can_trim:
                continue
            if length > best_length:
                best, best_length = kept, length
        if best is None:
            return 0, list
        self._uses += 1
        best.used = self._uses
        return best_length, lambda: cut(best.layers, len(best.tokens), best_length)

    def clear(self) -> None:
        """Drop all prefixes."""
        self._kept.clear()


def cut(layers: list[Any], length: int, wanted: int) -> list[Any]:
    """Return caches of the first `wanted` of `length` tokens; they share the arrays."""
    from copy import deepcopy

    from mlx_lm.models.cache import trim_prompt_cache

    copied = deepcopy(layers)
    if wanted < length:
        trim_prompt_cache(copied, length - wanted)
    return copied
