"""Checks whether mlx-lm can load a model, by its real classes and tensor shapes, without weights.

Imports mlx-lm and runs its code on a model's configuration: for limited child processes only.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.hf.config import HfFolder, flattened
from backends.hf.fit import (
    SHARED_DTYPES,
    ComputeFailed,
    RuntimeFit,
    TensorShape,
    first_line,
    importing,
)
from backends.hf.header import read_json
from backends.mlx.model import build_model, check_config, import_runtime, runtime_config
from core.errors import BrokenModel

_LARGEST = 2**31 - 1
_DTYPES = {
    **SHARED_DTYPES, "BOOL": "bool_", "F8_E4M3": "uint8", "F8_E5M2": "uint8", "F8_E8M0": "uint8",
}  # fmt: skip
_LISTED = re.compile(r"(Received|Missing) (\d+) parameters[^:]*:(.*)", re.DOTALL)


def start_runtime() -> None:
    """Start MLX's thread, on the CPU: a limited process may start none later."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    # Compiling would start a compiler.
    mx.disable_compile()
    mx.eval(mx.zeros(1) + 1)


def check_mlx(folder: HfFolder, tensors: Mapping[str, TensorShape]) -> RuntimeFit:
    """Build mlx-lm's model with placeholders of these shapes; allocates and computes nothing.

    Blocks for about a second the first time.  Raises MemoryError, BackendUnavailable if mlx-lm
    cannot be imported.
    """
    with importing("mlx-lm"):
        import_runtime(1)
    for name, each in tensors.items():
        if each.dtype not in _DTYPES:
            return RuntimeFit(f"MLX cannot read weights of type {each.dtype} ({name[:80]})")
        if max(each.shape, default=0) > _LARGEST:
            return RuntimeFit(f"the tensor {name[:80]} is too large for MLX")
    try:
        config = runtime_config(
            read_json(folder.path / "config.json"), folder.config, is_embedder=folder.is_embedder
        )
        check_config(config)
        model = _build(config, tensors, is_embedder=folder.is_embedder)
        reason = "" if folder.is_embedder else _cache_problem(model)
        return RuntimeFit(reason, 0 if reason else _parameters(model))
    except MemoryError:
        raise
    except BrokenModel as problem:
        return RuntimeFit(problem.message)
    except (Exception, SystemExit) as problem:
        return RuntimeFit(f"mlx-lm cannot load it: {_told(problem)}")


def compute_logits(
    raw: Mapping[str, Any], weights: Mapping[str, NDArray[Any]], tokens: list[int], *, alone: int
) -> NDArray[np.float32]:
    """Return the logits (tokens, vocabulary) of a small model on the CPU.

    The last `alone` tokens are computed one at a time, which uses the model's caches.  Raises
    ComputeFailed, and what mlx-lm raises for weights that do not fit.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    flat = flattened(dict(raw))
    config = runtime_config(raw, flat, is_embedder=False)
    if "vocab_size" not in config and "vocab_size" in flat:
        # Some wrappers have a default of their own, which the small vocabulary is not.
        config["vocab_size"] = flat["vocab_size"]
    arrays = {name: mx.array(array) for name, array in weights.items()}
    model = build_model(config, arrays, is_embedder=False)
    first = len(tokens) - alone
    parts = [tokens[:first], *([token] for token in tokens[first:])]
    try:
        cache = make_prompt_cache(model)
        logits = [model(mx.array([part]), cache=cache)[0].astype(mx.float32) for part in parts]
        return np.array(mx.concatenate(logits, axis=0))
    except MemoryError:
        raise
    except Exception as problem:
        raise ComputeFailed(first_line(problem)) from problem


def _build(config: dict[str, Any], tensors: Mapping[str, TensorShape], *, is_embedder: bool) -> Any:
    import mlx.core as mx

    placeholders = {
        name: mx.zeros(each.shape, getattr(mx, _DTYPES[each.dtype]))
        for name, each in tensors.items()
    }
    return build_model(config, placeholders, is_embedder=is_embedder)


def _cache_problem(model: Any) -> str:
    """Return why the model's caches cannot hold several sequences, empty if they can."""
    from mlx_lm.models.cache import make_prompt_cache

    for cache in make_prompt_cache(model):
        if not hasattr(cache, "merge"):
            return f"its cache {type(cache).__name__} in mlx-lm cannot hold several sequences"
    return ""


def _parameters(model: Any) -> int:
    """Return the number of weights, unpacked; without rotary tables and buffers."""
    total = 0
    for _, module in model.named_modules():
        bits = getattr(module, "bits", None)
        for name, array in module.items():
            if name.startswith("_") or not hasattr(array, "size"):
                continue
            if bits is None:
                total += int(array.size)
            elif name == "weight":
                total += int(array.size) * 32 // int(bits)
            elif name not in ("scales", "biases"):
                total += int(array.size)
    return total


def _told(problem: BaseException) -> str:
    """Return the reason in one line; of a list of parameters its length and its start."""
    match = _LISTED.match(str(problem))
    if match is None:
        return first_line(problem)
    names = " ".join(match[3].split())[:120].rstrip(" .,")
    if match[1] == "Received":
        return f"its code has no place for {match[2]} of the tensors: {names} …"
    return f"{match[2]} tensors that its code needs are missing: {names} …"
