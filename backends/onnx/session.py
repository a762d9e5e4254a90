"""Opens onnxruntime sessions and runs decoders with inputs and outputs bound to numpy arrays."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.onnx.layout import DecoderLayout
from core.errors import BrokenModel, EngineFailed
from core.units import MIB

_FATAL = 4
_F32_BYTES = 4
# Limit for graphs that compute the logits of every token of a chunk.
_MAX_LOGITS_BYTES = 128 * MIB


def open_session(path: Path, threads: int) -> Any:
    """Return an `InferenceSession` on the CPU; blocks while the weights are read.

    Not on Core ML, also for encoders: with inputs of any length it compiles and then fails at
    prediction, leaves a copy of the model in TMPDIR with each session, rounds to 16 bits, and was
    slower.  Sources: onnxruntime issues 21761, 22007 and 26023.  Raises BrokenModel with
    onnxruntime's reason.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # onnxruntime caches a pattern per shape, and here nearly every step has a new one.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    onnxruntime.disable_telemetry_events()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as problem:
        reason = " ".join(str(problem).split())[:500]
        raise BrokenModel(
            f"onnxruntime cannot load {path.name}: {reason}", param="model"
        ) from problem


def chunk_tokens(vocabulary_size: int) -> int:
    """Return how many tokens may be computed together if each has logits."""
    return max(1, _MAX_LOGITS_BYTES // (_F32_BYTES * max(vocabulary_size, 1)))


class Bindings:
    """Inputs and outputs of one run, bound to numpy arrays; keeps the arrays alive."""

    def __init__(self, session: Any) -> None:
        self._io = session.io_binding()
        self._kept: dict[str, NDArray[Any]] = {}

    @property
    def handle(self) -> Any:
        """The wrapped onnxruntime object."""
        return self._io

    def feed(self, name: str, values: NDArray[Any]) -> None:
        """Bind an input to `values`, which must be contiguous; not copied."""
        self._io.bind_input(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)
        self._kept[name] = values

    def receive(self, name: str, values: NDArray[Any]) -> None:
        """Bind an output to `values`, which must have its shape."""
        self._io.bind_output(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)
        self._kept[name] = values


class DecoderSession:
    """A decoder's onnxruntime session; used from one thread."""

    def __init__(self, session: Any, layout: DecoderLayout) -> None:
        self._session: Any = session
        self.layout = layout
        self.native_cpu_s = 0.0
        self.cache_dtype = np.dtype(layout.cache_dtype)
        self._logits_dtype = np.dtype(layout.logits_dtype)
        self._dtypes: Mapping[str, np.dtype[Any]] = {
            name: np.dtype(dtype) for name, dtype in layout.dtypes.items()
        }
        self._keeps_last = "num_logits_to_keep" in layout.dtypes

    @property
    def chunk_tokens(self) -> int:
        """Maximum tokens of one row that are computed together."""
        if self._keeps_last:
            return 1 << 30
        return chunk_tokens(self.layout.vocabulary_size)

    def bindings(self) -> Bindings:
        """Return an empty set of bindings for `run`."""
        return Bindings(self._session)

    def run(
        self,
        bindings: Bindings,
        tokens: Sequence[Sequence[int]],
        past: NDArray[np.int64],
        mask: NDArray[np.bool_],
        *,
        keeps_all: bool = False,
    ) -> NDArray[np.float32]:
        """Compute the same number of `tokens` per row; return the last logits (rows, vocabulary).

        With `keeps_all` those of each token of one row: (tokens, vocabulary).
        `past` (rows,) are the lengths before, without padding; `mask` (rows, columns) is what may
        be attended to, including the new tokens.  The cache must be bound.  Raises EngineFailed.
        """
        ids = np.asarray(tokens, np.int64)
        rows, count = ids.shape
        kept = 1 if self._keeps_last and not keeps_all else count
        for name, values in self._inputs(ids, past, mask, kept):
            bindings.feed(name, np.asarray(values, self._dtypes[name], order="C"))
        logits = np.empty((rows, kept, self.layout.vocabulary_size), self._logits_dtype)
        bindings.receive("logits", logits)
        started = time.thread_time()
        try:
            self._session.run_with_iobinding(bindings.handle)
        except Exception as problem:
            reason = " ".join(str(problem).split())[:500]
            raise EngineFailed(f"onnxruntime failed: {reason}") from problem
        self.native_cpu_s += time.thread_time() - started
        return np.asarray(logits[0] if keeps_all else logits[:, -1], np.float32)

    def _inputs(
        self, ids: NDArray[np.int64], past: NDArray[np.int64], mask: NDArray[np.bool_], kept: int
    ) -> list[tuple[str, NDArray[Any]]]:
        count = ids.shape[1]
        columns = mask.shape[1]
        made: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "attention_mask": mask,
            "num_logits_to_keep": np.full(self._shape("num_logits_to_keep"), kept, np.int64),
            # Merged exports contain two graphs; the one for an empty past ignores the cache.
            "use_cache_branch": np.full(self._shape("use_cache_branch"), columns > count),
        }
        if "position_ids" in self._dtypes:
            made["position_ids"] = past[:, None] + np.arange(count)
        if "cache_position" in self._dtypes:
            made["cache_position"] = np.arange(columns - count, columns)
        return [(name, made[name]) for name in self._dtypes]

    def _shape(self, name: str) -> tuple[int, ...]:
        return () if name in self.layout.scalars else (1,)

    def close(self) -> None:
        """Free the weights; twice is fine."""
        self._session = None
