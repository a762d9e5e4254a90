"""Ragged attention: rows of different lengths in one forward pass of a transformers model.

All tokens of a step are packed into one row of inputs, and each segment of it attends to its own
KV cache.  Nothing is padded, and no cache is copied or assembled for a step.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME = "impetus_ragged"
_MIN_CAPACITY = 128
_WORD = 4
_local = threading.local()


@dataclass(slots=True)
class LayerCache:
    """One layer's keys and values of one row: (kv heads, capacity, head dimension) each."""

    keys: Any
    values: Any


@dataclass(slots=True)
class RowCache:
    """One row's KV cache; `length` tokens are valid in every layer.

    It is allocated as the row grows, so that unused capacity costs nothing.
    """

    length: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)

    def append(self, layer: int, keys: Any, values: Any) -> LayerCache:
        """Write the keys and values of new tokens, (kv heads, count, head dimension)."""
        end = self.length + keys.shape[1]
        cache = self.layers.get(layer)
        if cache is None or cache.keys.shape[1] < end:
            cache = self.layers[layer] = self._grown(cache, keys, values, end)
        cache.keys[:, self.length : end] = keys
        cache.values[:, self.length : end] = values
        return cache

    def _grown(self, cache: LayerCache | None, keys: Any, values: Any, needed: int) -> LayerCache:
        # Growing by a quarter keeps copying a small part of the cost of filling the cache.
        capacity = max(_MIN_CAPACITY, needed + needed // 4)
        grown = LayerCache(
            keys.new_empty((keys.shape[0], capacity, keys.shape[2])),
            values.new_empty((values.shape[0], capacity, values.shape[2])),
        )
        if cache is not None:
            grown.keys[:, : self.length] = cache.keys[:, : self.length]
            grown.values[:, : self.length] = cache.values[:, : self.length]
        return grown

    def copy(self, length: int) -> "RowCache":
        """Return a copy with the first `length` tokens."""
        layers = {
            index: LayerCache(cache.keys[:, :length].clone(), cache.values[:, :length].clone())
            for index, cache in self.layers.items()
        }
        return RowCache(length, layers)

    def packed(self, start: int, count: int) -> NDArray[np.uint8]:
        """Return `count` tokens of all layers as bytes, after the layers' shapes as int32."""
        import torch

        shapes, parts = list[int](), []
        for index, cache in sorted(self.layers.items()):
            shapes += (index, cache.keys.shape[0], cache.keys.shape[2], cache.values.shape[2])
            for values in (cache.keys, cache.values):
                part = values[:, start : start + count].contiguous().view(torch.uint8)
                parts.append(part.cpu().numpy().reshape(-1))
        head = np.array([len(shapes), *shapes], np.int32).view(np.uint8)
        return np.concatenate([head, *parts])

    def append_packed(self, count: int, state: NDArray[np.uint8], dtype: Any, device: Any) -> bool:
        """Append `count` tokens from `packed`; False if `state` has another size."""
        import torch

        words = int(state[:_WORD].view(np.int32)[0])
        offset = (words + 1) * _WORD
        shapes = state[_WORD:offset].view(np.int32).reshape(-1, 4).tolist()
        sizes = (heads * (width + wide) for _, heads, width, wide in shapes)
        if state.nbytes != offset + sum(sizes) * count * dtype.itemsize:
            return False
        for layer, heads, *widths in shapes:
            pair = []
            for width in widths:
                size = heads * count * width * dtype.itemsize
                part = torch.from_numpy(state[offset : offset + size].copy())
                pair.append(part.view(dtype).reshape(heads, count, width).to(device))
                offset += size
            self.append(layer, *pair)
        self.length += count
        return True


@dataclass(slots=True)
class Segment:
    """The new tokens of a row: packed positions `start` to `start + count`."""

    cache: RowCache
    start: int
    count: int
    masks: dict[int | None, Any] = field(default_factory=dict)

    def mask(self, window: int | None, first: int, device: Any) -> Any:
        """Return which cached tokens each new one attends to, (count, cached), from `first` on."""
        found = self.masks.get(window)
        if found is None:
            import torch

            past = self.cache.length
            queries = torch.arange(past, past + self.count, device=device)[:, None]
            keys = torch.arange(first, past + self.count, device=device)[None, :]
            found = keys <= queries
            if window is not None:
                found &= keys > queries - window
            self.masks[window] = found
        return found


@dataclass(slots=True)
class Step:
    """The segments of one forward pass; `windows` is each layer's sliding window or None."""

    segments: Sequence[Segment]
    windows: Sequence[int | None]

    def __enter__(self) -> "Step":
        _local.step = self
        return self

    def __exit__(self, *_: object) -> None:
        _local.step = None


def register_attention() -> None:
    """Register the attention with transformers under NAME; idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    **_: Any,
) -> tuple[Any, None]:
    """Implement transformers' attention interface: (1, heads, tokens, dim) each.

    Raises NotImplementedError for attention that is not over a row's own causal cache.
    """
    step: Step | None = getattr(_local, "step", None)
    if step is None or attention_mask is not None or position_bias is not None:
        raise NotImplementedError("ragged attention supports packed causal tokens only")
    window = step.windows[module.layer_idx]
    output = query.new_empty((query.shape[2], query.shape[1], value.shape[3]))
    for segment in step.segments:
        end = segment.start + segment.count
        cache = segment.cache.append(
            module.layer_idx, key[0, :, segment.start : end], value[0, :, segment.start : end]
        )
        total = segment.cache.length + segment.count
        first = 0 if window is None else max(0, segment.cache.length + 1 - window)
        part = _SegmentAttention(
            query[:, :, segment.start : end],
            cache.keys[None, :, first:total],
            cache.values[None, :, first:total],
            scaling,
        )
        if softcap is None and s_aux is None:
            found = part.fused(segment, window, first)
        else:
            found = part.plain(segment.mask(window, first, query.device), softcap, s_aux)
        output[segment.start : end] = found[0].transpose(0, 1)
    return output[None], None


@dataclass(slots=True)
class _SegmentAttention:
    """One segment's query (1, heads, count, dim), keys and values (1, kv heads, cached, dim)."""

    query: Any
    keys: Any
    values: Any
    scaling: float | None

    def fused(self, segment: Segment, window: int | None, first: int) -> Any:
        """Return (1, heads, count, dim), computed by PyTorch's fused kernel."""
        from torch.nn.functional import scaled_dot_product_attention

        heads, kv_heads = self.query.shape[1], self.keys.shape[1]
        if segment.count == 1:
            # The query heads of a key head are treated as its tokens, so no key is repeated.
            grouped = self.query.reshape(1, kv_heads, heads // kv_heads, -1)
            found = scaled_dot_product_attention(
                grouped, self.keys, self.values, scale=self.scaling
            )
            return found.reshape(1, heads, 1, -1)
        is_causal = not segment.cache.length and (window is None or segment.count <= window)
        mask = None if is_causal else segment.mask(window, first, self.query.device)
        return scaled_dot_product_attention(
            self.query,
            self.keys,
            self.values,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scaling,
            enable_gqa=heads != kv_heads,
        )

    def plain(self, mask: Any, softcap: float | None, sinks: Any) -> Any:
        """Return the same, computed step by step with soft-capped logits and sinks (heads,)."""
        import torch

        heads, groups = self.query.shape[1], self.query.shape[1] // self.keys.shape[1]
        keys = self.keys.repeat_interleave(groups, 1)
        values = self.values.repeat_interleave(groups, 1)
        scaling = self.query.shape[3] ** -0.5 if self.scaling is None else self.scaling
        scores = torch.matmul(self.query, keys.transpose(2, 3)).float() * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            column = sinks.float().reshape(1, heads, 1, 1).expand(-1, -1, scores.shape[2], 1)
            weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return torch.matmul(weights.to(values.dtype), values)
