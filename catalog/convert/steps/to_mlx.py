"""Converts Hugging Face safetensors to MLX, optionally quantized."""

from typing import Any

from catalog.convert.graph import MLX_BITS
from catalog.convert.job import Job, Report, copy_sidecars, link_source, write_json
from catalog.convert.steps.from_gguf import DTYPES
from core.errors import UnsupportedCapability

# The default dtype of the weights that stay unquantized.
_QUANTIZED_DTYPE = "bfloat16"


def to_mlx(job: Job, report: Report) -> None:
    """Write an MLX folder; `job.quantization` is a dtype or a number of bits.

    Raises UnsupportedCapability for architectures that mlx-lm does not support.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_model

    report(0.0, "reading the weights")
    source = link_source(job)
    # mlx-lm reads only files named `model*.safetensors`, with or without an index.
    for number, shard in enumerate(sorted(source.glob("*.safetensors"))):
        if not shard.name.startswith("model"):
            shard.rename(source / f"model-{number}-{shard.name}")
    try:
        model, config = load_model(source, lazy=True)
    except ValueError as error:
        raise UnsupportedCapability(f"MLX does not support {job.name}: {error}") from error
    bits = MLX_BITS.get(job.quantization)
    dtype = _kept_dtype(config) if bits else DTYPES[job.quantization]
    _cast(model, getattr(mx, dtype))
    config["dtype"] = config["torch_dtype"] = dtype
    if bits:
        report(0.2, f"quantizing to {bits} bits")
        model, config = quantize_model(model, config, job.group_size, bits)
        config["quantization_config"] = config["quantization"]
    report(0.5, "writing the weights")
    save_model(job.output, model, donate_model=True)
    write_json(job.output / "config.json", dict(sorted(config.items())))
    copy_sidecars(source, job.output)
    report(1.0, "done")


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
