"""Rows over a transformers model: packed, one per forward pass, or without a KV cache."""

import copy
import gc
import inspect
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.engine.row_model import RowInput
from backends.pytorch.attention import RowCache, Segment, Step
from core.errors import EngineFailed

# Layers whose cache accepts several tokens at any time; others have recurrent state.
_CACHED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "dummy"})


class _TorchRows:
    """Base of packed and separate rows: the model, its device and CPU time."""

    def __init__(self, model: Any, max_rows: int) -> None:
        self._model = model
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._ids = count()
        self.max_rows = max_rows
        self.vocabulary_size = int(model.config.get_text_config(decoder=True).vocab_size)
        self.native_cpu_s = 0.0

    def _numbers(self, values: Sequence[int]) -> Any:
        import torch

        return torch.tensor(values, dtype=torch.long, device=self._model.device)

    def _position_options(self, start: int, count: int) -> dict[str, Any]:
        """Return positions as an argument, as transformers' `generate` gives them.

        Some architectures begin at 0 without it, whatever their cache holds.
        """
        if "position_ids" not in self._parameters:
            return {}
        return {"position_ids": self._numbers(range(start, start + count))[None]}

    def _timed(self, compute: Callable[[], Any]) -> NDArray[np.float32]:
        """Return `compute()`, a tensor (rows, vocabulary), as float32.  Raises EngineFailed."""
        import torch

        started = time.thread_time()
        try:
            with torch.inference_mode():
                logits = compute()[:, : self.vocabulary_size].float().cpu().numpy()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as problem:
            raise EngineFailed(f"PyTorch failed: {problem}") from problem
        finally:
            self.native_cpu_s += time.thread_time() - started
        found: NDArray[np.float32] = np.require(logits, np.float32, ["C", "W"])
        return found

    def close(self) -> None:
        """Free the weights; twice is fine."""
        import torch

        self._model = None
        gc.collect()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()


class PackedRows(_TorchRows):
    """All rows' new tokens in one forward pass, packed without padding; see `RowModel`."""

    def __init__(self, model: Any, windows: Sequence[int | None], max_rows: int) -> None:
        """`windows` are each layer's sliding window; the model must use the ragged attention."""
        super().__init__(model, max_rows)
        self._windows = windows
        self._dtype = model.dtype
        self._rows: dict[int, RowCache] = {}

    def open_row(self, capacity: int) -> int:
        """Return an empty row; its memory grows with its tokens."""
        del capacity
        row = next(self._ids)
        self._rows[row] = RowCache()
        return row

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens to all rows in one pass; return the logits after each row's last."""
        return self._extend(rows, keeps_all=False)

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        """Append tokens to a row; return the logits after each."""
        return self._extend([row], keeps_all=True)

    def _extend(self, rows: Sequence[RowInput], *, keeps_all: bool) -> NDArray[np.float32]:
        segments, tokens, positions, kept = [], list[int](), list[int](), list[int]()
        for each in rows:
            cache = self._rows[each.row]
            segments.append(Segment(cache, len(tokens), len(each.tokens)))
            first = len(tokens)
            tokens.extend(each.tokens)
            positions.extend(range(cache.length, cache.length + len(each.tokens)))
            kept.extend(range(first if keeps_all else len(tokens) - 1, len(tokens)))
        logits = self._timed(lambda: self._forward(segments, tokens, positions, kept))
        for segment in segments:
            segment.cache.length += segment.count
        return logits

    def _forward(
        self,
        segments: Sequence[Segment],
        tokens: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
    ) -> Any:
        kept = self._numbers(wanted)
        cuts = "logits_to_keep" in self._parameters
        options = {"logits_to_keep": kept} if cuts else {}
        with Step(segments, self._windows):
            logits = self._model(
                input_ids=self._numbers(tokens)[None],
                position_ids=self._numbers(positions)[None],
                use_cache=False,
                **options,
            ).logits[0]
        return logits if cuts else logits[kept]

    def truncate(self, row: int, length: int) -> bool:
        """Keep the first `length` tokens; always possible."""
        self._rows[row].length = min(self._rows[row].length, length)
        return True

    def copy_row(self, source: int, length: int, capacity: int) -> int:
        """Return a new row holding a copy of the first `length` tokens."""
        row = self.open_row(capacity)
        self._rows[row] = self._rows[source].copy(length)
        return row

    @property
    def layout(self) -> str:
        """What the bytes of `read_tokens` depend on besides the model's files."""
        libraries = f"torch {version('torch')}, transformers {version('transformers')}"
        return f"{libraries}, {self._dtype}, windows {list(self._windows)}"

    def read_tokens(self, row: int, start: int, count: int) -> NDArray[np.uint8]:
        """Return a copy of the keys and values of `count` tokens, as a flat array."""
        return self._rows[row].packed(start, count)

    def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
        """Append `count` tokens from `read_tokens`; False if `state` has another size."""
        return self._rows[row].append_packed(count, state, self._dtype, self._model.device)

    def close_row(self, row: int) -> None:
        """Free a row's cache."""
        self._rows.pop(row, None)

    def close(self) -> None:
        """Free the caches and the weights; twice is fine."""
        self._rows.clear()
        super().close()


class SeparateRows(_TorchRows):
    """One forward pass per row with the model's own cache, for models that cannot be packed.

    These have recurrent state, caches shared between layers, or custom attention.
    """

    def __init__(self, model: Any, max_rows: int) -> None:
        """Raises EngineFailed for a model without a cache."""
        super().__init__(model, max_rows)
        names = self._parameters & {"past_key_values", "cache_params"}
        if not names:
            raise EngineFailed(
                f"{type(model).__name__} has no cache between tokens, so it cannot be run here."
            )
        self._cache_name = max(names)
        kinds, _ = layer_kinds(model)
        self._is_recurrent = not kinds or not _CACHED_LAYERS.issuperset(kinds)
        self._rows: dict[int, tuple[Any, int]] = {}

    def open_row(self, capacity: int) -> int:
        """Return an empty row; its memory grows with its tokens."""
        from transformers import DynamicCache

        del capacity
        row = next(self._ids)
        self._rows[row] = (DynamicCache(config=self._model.config), 0)
        return row

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens to the rows one by one; return the logits after each row's last."""
        return np.concatenate([self._timed(partial(self._run, each)) for each in rows])

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        """Append tokens to a row; return the logits after each."""
        return self._timed(partial(self._run, row, keeps_all=True))

    def _run(self, each: RowInput, *, keeps_all: bool = False) -> Any:
        import torch

        cache, past = self._rows[each.row]
        found: list[Any] = []
        # A recurrent layer accepts several tokens at once only before it has state.
        width = 1 if self._is_recurrent and past else len(each.tokens)
        options: dict[str, Any] = {self._cache_name: cache, "use_cache": True}
        if "logits_to_keep" in self._parameters and not keeps_all:
            options["logits_to_keep"] = 1
        for start in range(0, len(each.tokens), width):
            tokens = self._numbers(each.tokens[start : start + width])[None]
            options |= self._position_options(past, tokens.shape[1])
            logits = self._model(input_ids=tokens, **options).logits
            past += tokens.shape[1]
            self._rows[each.row] = (cache, past)
            if keeps_all:
                found.append(logits[0])
        return torch.cat(found) if keeps_all else logits[:, -1]

    def truncate(self, row: int, length: int) -> bool:
        """Keep the first `length` tokens; False if the cache no longer has them."""
        cache, past = self._rows[row]
        if length >= past:
            return True
        if not self._can_crop(cache):
            return False
        cache.crop(length - past)
        self._rows[row] = (cache, length)
        return True

    def _can_crop(self, cache: Any) -> bool:
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        return not self._is_recurrent and all(
            type(layer) is DynamicLayer
            or (
                type(layer) is DynamicSlidingWindowLayer
                and layer.get_seq_length() < layer.sliding_window
            )
            for layer in cache.layers
        )

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Return a new row holding a copy of the first `length` tokens, or None."""
        cache, past = self._rows[source]
        if length < past and not self._can_crop(cache):
            return None
        row = self.open_row(capacity)
        self._rows[row] = (copy.deepcopy(cache), past)
        self.truncate(row, length)
        return row

    def close_row(self, row: int) -> None:
        """Free a row's cache."""
        self._rows.pop(row, None)

    def close(self) -> None:
        """Free the caches and the weights; twice is fine."""
        self._rows.clear()
        super().close()


class UncachedRows(_TorchRows):
    """One forward pass per row over its whole text, for models whose cache is wrong or missing."""

    def __init__(self, model: Any, max_rows: int) -> None:
        super().__init__(model, max_rows)
        self._rows: dict[int, list[int]] = {}

    def open_row(self, capacity: int) -> int:
        """Return an empty row."""
        del capacity
        row = next(self._ids)
        self._rows[row] = []
        return row

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens to the rows one by one; return the logits after each row's last.

        On failure the row that failed, and those after it, are unchanged.
        """
        return np.concatenate([self._append(each, 1) for each in rows])

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        """Append tokens to a row; return the logits after each."""
        return self._append(row, len(row.tokens))

    def _append(self, each: RowInput, kept: int) -> NDArray[np.float32]:
        text = [*self._rows[each.row], *each.tokens]
        logits = self._timed(partial(self._run, text, kept))
        self._rows[each.row] = text
        return logits

    def _run(self, text: Sequence[int], kept: int) -> Any:
        options = self._position_options(0, len(text))
        if "use_cache" in self._parameters:
            options["use_cache"] = False
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = kept
        return self._model(input_ids=self._numbers(text)[None], **options).logits[0, -kept:]

    def truncate(self, row: int, length: int) -> bool:
        """Keep the first `length` tokens; always possible."""
        del self._rows[row][length:]
        return True

    def copy_row(self, source: int, length: int, capacity: int) -> int:
        """Return a new row with the first `length` tokens of another."""
        row = self.open_row(capacity)
        self._rows[row] = self._rows[source][:length]
        return row

    def close_row(self, row: int) -> None:
        """Forget a row."""
        self._rows.pop(row, None)

    def close(self) -> None:
        """Free the weights; twice is fine."""
        self._rows.clear()
        super().close()


def layer_kinds(model: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Return each layer's type as transformers names it, and its cache's arguments."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    try:
        kinds, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    except (AttributeError, TypeError, ValueError):
        return [], []
    return list(kinds), list(arguments)
