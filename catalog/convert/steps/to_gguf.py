"""Converts Hugging Face safetensors of llama's family to GGUF, and requantizes GGUF files.

Source of the keys and the order of rows: llama.cpp `convert_hf_to_gguf.py`.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.layout import FILE_TYPES
from catalog.convert.job import Job, Report, link_source
from catalog.convert.steps.from_gguf import quantize_file, single_file
from catalog.convert.steps.gguf_tokenizer import check_same_tokens
from catalog.convert.steps.hf_source import ARCHITECTURES, HfSource, add_vocabulary, read_source
from catalog.convert.steps.number_check import as_float16, check_finite
from core.errors import BrokenModel, UnsupportedCapability

_TYPE_IDS = {name: number for number, name in FILE_TYPES.items()}
_DIRECT = ("f32", "f16", "bf16")


def file_type(quantization: str) -> int:
    """Return the llama_ftype for the name of a quantization."""
    return _TYPE_IDS[quantization]


def requantize(job: Job, report: Report) -> None:
    """Write the GGUF model with another quantization, as one file."""
    report(0.0, "quantizing")
    source = single_file(job)
    target = job.output / f"{job.name}.gguf"
    quantize_file(source, target, file_type=file_type(job.quantization), threads=job.threads)
    report(1.0, "done")


def to_gguf(job: Job, report: Report) -> None:
    """Write one GGUF file; llama.cpp quantizes it if the job asks for that.

    Raises BrokenModel, UnsupportedCapability, RequestError for weights that f16 cannot hold.
    """
    from tokenizers import Tokenizer

    source = link_source(job)
    model = read_source(source)
    target = job.output / f"{job.name}.gguf"
    is_direct = job.quantization in _DIRECT
    plain = target if is_direct else job.work / "plain.gguf"
    dtype = job.quantization if is_direct else "f32"
    _write(job, model, plain, dtype, report)
    report(0.7, "comparing the tokenizers")
    check_same_tokens(Tokenizer.from_file(str(source / "tokenizer.json")), plain)
    if not is_direct:
        report(0.75, "quantizing")
        quantize_file(plain, target, file_type=file_type(job.quantization), threads=job.threads)
    report(1.0, "done")


def _write(job: Job, model: HfSource, target: Path, dtype: str, report: Report) -> None:
    import gguf

    architecture = ARCHITECTURES[model.config["model_type"]]
    writer = gguf.GGUFWriter(target, architecture)
    try:
        _add_hyperparameters(writer, job, model, dtype)
        add_vocabulary(writer, model)
        layout = _Layout(model, architecture, dtype)
        for name, shape, kind in layout.shapes():
            count = math.prod(shape)
            numpy_type = np.dtype(np.float32 if kind == "f32" else np.float16)
            raw = gguf.GGMLQuantizationType.BF16 if kind == "bf16" else None
            raw_shape = (*shape[:-1], shape[-1] * 2) if kind == "bf16" else shape
            writer.add_tensor_info(
                name,
                raw_shape,
                np.dtype(np.uint8) if kind == "bf16" else numpy_type,
                count * (4 if kind == "f32" else 2),
                raw_dtype=raw,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, data in layout.data():
            report(0.7 * done, "writing the weights")
            writer.write_tensor_data(data)
    finally:
        writer.close()


def _add_hyperparameters(writer: Any, job: Job, model: HfSource, dtype: str) -> None:
    config = model.config
    writer.add_name(job.name)
    writer.add_block_count(model.number("num_hidden_layers"))
    writer.add_context_length(model.number("max_position_embeddings"))
    writer.add_embedding_length(model.number("hidden_size"))
    writer.add_feed_forward_length(model.number("intermediate_size"))
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(model.number("vocab_size"))
    writer.add_rope_freq_base(float(config.get("rope_theta", 10_000.0)))
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_file_type(file_type(dtype))
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    elif kind not in ("default", "llama3"):
        raise UnsupportedCapability(
            f"The RoPE scaling {kind!r} cannot be converted to GGUF; supported are "
            "linear and llama3.",
            param="target_format",
        )


class _Layout:
    """The tensors of a folder with GGUF's names, in the same order for header and data."""

    def __init__(self, model: HfSource, architecture: str, dtype: str) -> None:
        import gguf

        self._model = model
        self._dtype = dtype
        self._is_llama = architecture == "llama"
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        layers = model.number("num_hidden_layers")
        self._names = gguf.get_tensor_name_map(kinds[architecture], layers)
        self._files = sorted(model.folder.glob("*.safetensors"))

    def _kind(self, shape: tuple[int, ...]) -> str:
        return self._dtype if len(shape) > 1 else "f32"

    def _extra(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        factors = rope_factors(self._model.config, self._model.head_dim)
        if factors is not None:
            yield "rope_freqs.weight", factors

    def _entries(self) -> Iterator[tuple[Any, str, str]]:
        """Yield the open shard, the tensor's name in it, and its name in GGUF."""
        from safetensors import safe_open

        for file in self._files:
            with safe_open(file, "pt") as shard:
                for name in sorted(shard.keys()):
                    # Some exporters store these values, which are computed from the configuration.
                    if name.endswith("rotary_emb.inv_freq"):
                        continue
                    mapped = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
                    if mapped is None:
                        raise BrokenModel(
                            f"The tensor {name!r} is not part of this architecture.",
                            param="model",
                        )
                    if name == "lm_head.weight" and self._model.config.get("tie_word_embeddings"):
                        continue
                    yield shard, name, mapped

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield each tensor's GGUF name, shape and element type."""
        for name, data in self._extra():
            yield name, data.shape, "f32"
        for shard, name, mapped in self._entries():
            shape = tuple(shard.get_slice(name).get_shape())
            yield mapped, shape, self._kind(shape)

    def data(self) -> Iterator[tuple[float, NDArray[Any]]]:
        """Yield the progress from 0 to 1 and the next tensor in its final element type."""
        import gguf
        import torch

        total = sum(file.stat().st_size for file in self._files)
        done = 0
        for _, factors in self._extra():
            yield 0.0, factors
        for shard, name, _ in self._entries():
            values = shard.get_tensor(name).to(torch.float32)
            done += values.numel() * 4
            if self._is_llama and name.endswith(("q_proj.weight", "q_proj.bias")):
                values = _permuted(values, self._model.heads)
            elif self._is_llama and name.endswith(("k_proj.weight", "k_proj.bias")):
                values = _permuted(values, self._model.kv_heads)
            array = np.ascontiguousarray(values.numpy())
            check_finite(name, array)
            kind = self._kind(array.shape)
            if kind == "f16":
                array = as_float16(name, array)
            elif kind == "bf16":
                array = gguf.quants.quantize(array, gguf.GGMLQuantizationType.BF16)
            yield min(done / max(total, 1), 1.0), array


def _permuted(rows: Any, heads: int) -> Any:
    """Reorder the rows of llama's q and k for llama.cpp's rotary positions."""
    shape = rows.shape
    if shape[0] % (2 * heads):
        raise BrokenModel(f"{shape[0]} rows cannot be split into {heads} heads.", param="model")
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def rope_factors(config: Mapping[str, Any], head_dim: int) -> NDArray[np.float32] | None:
    """Return the divisors of llama 3's rotary frequencies, shape (head_dim / 2,); else None."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    base = float(config.get("rope_theta", 10_000.0))
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    trained = float(scaling["original_max_position_embeddings"])
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    wavelengths = 2 * math.pi * base**exponents
    smooth = np.clip((trained / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
