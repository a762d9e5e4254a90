"""Converts Hugging Face safetensors to MLX, optionally quantized."""

import inspect
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catalog.convert.graph import MLX_BITS
from catalog.convert.job import (
    Job,
    Report,
    first_line,
    link_source,
    read_json,
    set_dtype,
    write_json,
)
from catalog.convert.sidecars import copy_sidecars
from catalog.convert.steps.dtypes import DTYPES, SAFETENSORS_DTYPES
from catalog.convert.steps.hf_defaults import complete_config
from catalog.convert.steps.number_check import not_finite, too_large
from catalog.convert.steps.rotary import limit_to_window
from catalog.convert.tensor_file import LazyTensor, write_tensors
from core.errors import UnsupportedCapability
from core.files import visible_files

_DTYPE_NAMES = {name: key for key, name in SAFETENSORS_DTYPES.items()} | {"uint32": "U32"}
# mlx-lm's modules that any architecture uses.
_SHARED_MODULES = frozenset({"activations", "base", "cache", "rope_utils", "switch_layers"})
# The default dtype of the weights that stay unquantized.
_QUANTIZED_DTYPE = "bfloat16"


def to_mlx(job: Job, report: Report) -> None:
    """Write an MLX folder; `job.quantization` is a dtype or a number of bits.

    Raises UnsupportedCapability for architectures that mlx-lm does not support.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model

    report(0.0, "reading the weights")
    # Freed memory goes back at once.
    mx.set_cache_limit(0)
    source = link_source(job)
    complete_config(source)
    # mlx-lm reads only files named `model*.safetensors`, with or without an index.
    for number, shard in enumerate(visible_files(source, "*.safetensors")):
        if not shard.name.startswith("model"):
            shard.rename(source / f"model-{number}-{shard.name}")
    try:
        model, config = load_model(source, lazy=True)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedCapability(
            f"MLX does not support {job.name}: {first_line(error)}", param="target_format"
        ) from error
    bits = MLX_BITS.get(job.quantization)
    dtype = _kept_dtype(config) if bits else DTYPES[job.quantization]
    _cast(model, getattr(mx, dtype))
    made = read_json(source / "config.json")
    set_dtype(made, dtype)
    if not _knows_windows(made):
        limit_to_window(made)
    if bits:
        model, config = quantize_model(model, config, job.group_size, bits)
        made["quantization"] = made["quantization_config"] = config["quantization"]
    tensors = _lazy_tensors(model)
    # Only the tensors' own references stay, so that each is freed when it is written.
    del model
    write_tensors(
        job.output,
        tensors,
        metadata={"format": "mlx"},
        on_progress=lambda share: report(0.05 + 0.95 * share, "writing the weights"),
    )
    copy_sidecars(job.folder, job.output)
    write_json(job.output / "config.json", made)
    report(1.0, "done")


def _knows_windows(config: dict[str, Any]) -> bool:
    """Whether the code that mlx-lm loaded for this model has sliding windows."""
    modules = {
        name.rpartition(".")[2]: module
        for name, module in sys.modules.items()
        if name.startswith("mlx_lm.models.") and module is not None
    }
    if "llama" in modules and not isinstance(config.get("layer_types"), list):
        # It has them only where the configuration lists the layers.
        return False
    own = [module for name, module in modules.items() if name not in _SHARED_MODULES]
    return any("sliding_window" in inspect.getsource(module) for module in own)


def _lazy_tensors(model: Any) -> list[LazyTensor]:
    """Return the model's parameters, computed when they are written and freed afterwards."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map

    parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    return [
        LazyTensor(name, _DTYPE_NAMES[str(value.dtype).rpartition(".")[2]], tuple(value.shape),
                   partial(_computed, parameters, name))
        for name, value in parameters.items()
    ]  # fmt: skip


def _computed(parameters: dict[str, Any], name: str) -> Iterator[NDArray[Any]]:
    """Yield a parameter's bytes.  Raises BrokenModel, RequestError, see `check_cast`."""
    import mlx.core as mx

    value = parameters.pop(name)
    mx.eval(value)
    if mx.issubdtype(value.dtype, mx.floating):
        _check_finite(name, value)
    yield np.array(mx.contiguous(value).reshape(-1).view(mx.uint8), copy=False)


def _check_finite(name: str, value: Any) -> None:
    """Raise BrokenModel for NaN, RequestError for an infinity, which the cast made."""
    import mlx.core as mx

    if mx.isnan(value).any().item():
        raise not_finite(name)
    if mx.isinf(value).any().item():
        raise too_large(name)


def _kept_dtype(config: dict[str, Any]) -> str:
    """Return the dtype of norms and scales beside quantized weights: the source's, if 16-bit."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if dtype in ("float16", "bfloat16") else _QUANTIZED_DTYPE


def _cast(model: Any, dtype: Any) -> None:
    """Cast all floating-point parameters for which the model allows it."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    may_change = getattr(model, "cast_predicate", lambda _name: True)

    def cast(name: str, value: Any) -> Any:
        is_floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(dtype) if is_floating and may_change(name) else value

    model.update(tree_map_with_path(cast, model.parameters()))
