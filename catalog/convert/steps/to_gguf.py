"""Converts Hugging Face safetensors of llama's family to GGUF, and requantizes GGUF files.

Source of the keys and the order of rows: llama.cpp `convert_hf_to_gguf.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from backends.gguf.layout import FILE_TYPES
from catalog.convert.job import Job, Report, link_source, weight_files
from catalog.convert.steps.from_gguf import quantize_file, single_file
from catalog.convert.steps.gguf_config import ROPE_FREQS
from catalog.convert.steps.gguf_tokenizer import check_same_tokens
from catalog.convert.steps.hf_source import (
    ARCHITECTURES,
    HfSource,
    add_settings,
    add_vocabulary,
    read_source,
)
from catalog.convert.steps.number_check import as_float16, check_finite
from catalog.convert.steps.rotary import llama3_factors, rope_kind, rope_scaling
from catalog.convert.steps.torch_files import (
    StoredTensor,
    close_files,
    listed_tensors,
    tensor_rows,
)
from catalog.convert.tensor_file import head_rows
from core.errors import BrokenModel

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
    model = read_source(link_source(job), job.folder)
    target = job.output / f"{job.name}.gguf"
    is_direct = job.quantization in _DIRECT
    plain = target if is_direct else job.work / "plain.gguf"
    dtype = job.quantization if is_direct else "f32"
    layout = _Layout(model, weight_files(job, (".safetensors",)), dtype)
    # A file without weights tells whether the tokenizer can be converted at all.
    report(0.01, "comparing the tokenizers")
    trial = job.work / "tokenizer.gguf"
    _write(job, model, trial, dtype, None, report)
    added = [token["content"] for token in model.tokenizer_json.get("added_tokens", ())]
    check_same_tokens(model.tokenizer, added, trial)
    _write(job, model, plain, dtype, layout, report)
    close_files()
    if not is_direct:
        report(0.75, "quantizing")
        quantize_file(plain, target, file_type=file_type(job.quantization), threads=job.threads)
    report(1.0, "done")


def _write(
    job: Job, model: HfSource, target: Path, dtype: str, layout: "_Layout | None", report: Report
) -> None:
    """Write a GGUF file; only its metadata if `layout` is None."""
    import gguf

    writer = gguf.GGUFWriter(target, ARCHITECTURES[model.config["model_type"]])
    try:
        _add_hyperparameters(writer, job, model, dtype)
        add_vocabulary(writer, model)
        add_settings(writer, model)
        for tensor in layout.tensors if layout is not None else ():
            element = np.dtype(np.float32 if tensor.kind == "f32" else np.float16)
            is_bf16 = tensor.kind == "bf16"
            # gguf-py takes bfloat16 as bytes.
            shape = (*tensor.shape[:-1], tensor.shape[-1] * 2) if is_bf16 else tensor.shape
            writer.add_tensor_info(
                tensor.gguf_name,
                shape,
                np.dtype(np.uint8) if is_bf16 else element,
                tensor.nbytes,
                raw_dtype=gguf.GGMLQuantizationType.BF16 if is_bf16 else None,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written, total = 0, sum(each.nbytes for each in layout.tensors) if layout else 0
        for tensor in layout.tensors if layout is not None else ():
            report(0.05 + 0.65 * written / total, "writing the weights")
            writer.write_tensor_data(tensor)
            written += tensor.nbytes
    finally:
        writer.close()


def _add_hyperparameters(writer: Any, job: Job, model: HfSource, dtype: str) -> None:
    config = model.config
    writer.add_name(job.name)
    writer.add_block_count(model.number("num_hidden_layers"))
    writer.add_context_length(model.context)
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
    if rope_kind(config) == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope_scaling(config)["factor"]))


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that gguf-py writes as it writes an array, but in pieces.

    `kind` is its element type in the file; `compute` yields its values as float32.
    """

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    kind: str
    compute: Callable[[], Iterator[NDArray[np.float32]]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * (4 if self.kind == "f32" else 2)

    def tofile(self, file: BinaryIO) -> None:
        """Write the values.  Raises BrokenModel, RequestError for what f16 cannot hold."""
        import gguf

        for values in self.compute():
            check_finite(self.name, values)
            array: NDArray[Any] = values
            if self.kind == "f16":
                array = as_float16(self.name, values)
            elif self.kind == "bf16":
                array = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class _Layout:
    """The tensors of a folder with GGUF's names.  Raises BrokenModel, UnsupportedCapability."""

    def __init__(self, model: HfSource, files: Sequence[Path], dtype: str) -> None:
        import gguf

        self._model = model
        architecture = ARCHITECTURES[model.config["model_type"]]
        self._is_llama = architecture == "llama"
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        layers = model.number("num_hidden_layers")
        names = gguf.get_tensor_name_map(kinds[architecture], layers)
        found: dict[str, _Tensor] = {}
        if rope_kind(model.config) == "llama3":
            factors = llama3_factors(
                rope_scaling(model.config),
                float(model.config.get("rope_theta", 10_000.0)),
                model.head_dim,
            )
            found[ROPE_FREQS] = _Tensor(
                ROPE_FREQS, ROPE_FREQS, factors.shape, "f32", lambda: iter((factors,))
            )
        for stored in listed_tensors(files):
            name = stored.name
            if self._is_omitted(name):
                continue
            mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if mapped is None or mapped in found:
                raise BrokenModel(
                    f"The tensor {name!r} is not part of this architecture, or occurs twice.",
                    param="model",
                )
            kind = dtype if len(stored.shape) > 1 else "f32"
            found[mapped] = _Tensor(name, mapped, stored.shape, kind, partial(self._values, stored))
        self.tensors = tuple(found.values())
        self._check_complete({tensor.name: tensor.shape for tensor in self.tensors})

    def _is_omitted(self, name: str) -> bool:
        """Whether a tensor is computed anew; some exporters store the rotary frequencies."""
        is_tied = self._model.config.get("tie_word_embeddings") is True
        return name.endswith("rotary_emb.inv_freq") or (is_tied and name == "lm_head.weight")

    def _check_complete(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that no weight is missing: llama.cpp would notice, or use another one."""
        kind = self._model.config["model_type"]
        parts = [
            *(f"self_attn.{each}_proj" for each in "qkvo"),
            *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
            *("input_layernorm", "post_attention_layernorm"),
            *(f"self_attn.{each}_norm" for each in ("qk" if kind == "qwen3" else "")),
        ]
        needed = ["model.embed_tokens.weight", "model.norm.weight"]
        if self._model.config.get("tie_word_embeddings") is not True:
            needed.append("lm_head.weight")
        for layer in range(self._model.number("num_hidden_layers")):
            needed += [f"model.layers.{layer}.{part}.weight" for part in parts]
        missing = next((name for name in needed if name not in shapes), None)
        if missing is not None:
            raise BrokenModel(f"The weights lack the tensor {missing}.", param="model")
        rows = shapes["model.embed_tokens.weight"][0]
        if rows != self._model.number("vocab_size"):
            raise BrokenModel(
                f"vocab_size is {self._model.number('vocab_size')}, but the embeddings have "
                f"{rows} rows.",
                param="model",
            )

    def _values(self, tensor: StoredTensor) -> Iterator[NDArray[np.float32]]:
        import torch

        heads = 0
        if self._is_llama and tensor.name.endswith(("q_proj.weight", "q_proj.bias")):
            heads = self._model.heads
        elif self._is_llama and tensor.name.endswith(("k_proj.weight", "k_proj.bias")):
            heads = self._model.kv_heads
        rows = head_rows(tensor.shape, heads) if heads else 1
        for piece in tensor_rows(tensor, multiple=rows):
            values = piece.to(torch.float32).numpy()
            yield np.ascontiguousarray(_permuted(values, rows) if heads else values)


def _permuted(values: NDArray[Any], rows: int) -> NDArray[Any]:
    """Reorder the rows of Llama's heads for llama.cpp's rotary positions; shape (rows, …)."""
    halves = values.reshape(-1, 2, rows // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
