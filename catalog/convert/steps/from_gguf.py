"""Converts GGUF to Hugging Face: dequantizes the weights, rebuilds and checks the tokenizer."""

import ctypes
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.file import gguf_info
from backends.gguf.header import GgufFile, read_gguf
from catalog.convert.job import Job, Report, read_json, write_json
from catalog.convert.steps.dtypes import DTYPES, SAFETENSORS_DTYPES, raw_bytes
from catalog.convert.steps.gguf_config import ROPE_FREQS, hf_config, hf_name, unpermuted_heads
from catalog.convert.steps.gguf_tokenizer import (
    gguf_vocabulary,
    match_gguf_tokenizer,
    use_llama_blanks,
)
from catalog.convert.steps.number_check import cast_checked
from catalog.convert.tensor_file import LazyTensor, head_rows, rows_at_once, write_tensors
from core.errors import ImpetusError

_TEMPLATE = "tokenizer.chat_template"
_LONGEST_LICENSE = 200
_TEMPLATE_NAME = re.compile(r"\w{1,60}")
# Of generation_config.json: the name after `general.sampling`.
SAMPLING = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF model's files, in a folder of their own, its header and its tensors by name.

    The tensors' data is mapped into memory and read when it is used.
    """

    files: tuple[Path, ...]
    header: GgufFile
    tensors: Mapping[str, Any]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return each tensor's shape, rows first."""
        return {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self.tensors.items()
        }

    def rope_freqs(self) -> NDArray[np.float32] | None:
        """Return the divisors of the rotary frequencies, None without any."""
        tensor = self.tensors.get(ROPE_FREQS)
        return None if tensor is None else np.array(tensor.data, np.float32)


def open_gguf(job: Job) -> GgufSource:
    """Open all files of the source; reads no weights.  Raises BrokenModel, NotThisFormat."""
    from gguf import GGUFReader

    gguf_info(job.files[0])
    files = _linked(job)
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    return GgufSource(files, read_gguf(files[0]), tensors)


def _linked(job: Job) -> tuple[Path, ...]:
    """Link the files into a folder of their own, whose other files transformers would read.

    A single file gets a name with the usual ending, which a cache's files do not have.
    """
    folder = job.work / "gguf"
    folder.mkdir()
    names = [file.name for file in job.files] if len(job.files) > 1 else ["model.gguf"]
    for name, file in zip(names, job.files, strict=True):
        os.symlink(file.resolve(strict=True), folder / name)
    return tuple(folder / name for name in names)


def single_file(job: Job) -> Path:
    """Return the source as one valid GGUF file, merging split files.  Raises BrokenModel."""
    gguf_info(job.files[0])
    if len(job.files) == 1:
        return job.files[0]
    merged = job.work / "merged.gguf"
    quantize_file(job.files[0], merged, file_type=None, threads=job.threads)
    return merged


def quantize_file(source: Path, target: Path, *, file_type: int | None, threads: int) -> None:
    """Write `source` with another llama_ftype; None copies the tensors unchanged.

    Blocks until the file is written.  Raises ImpetusError.
    """
    from backends.gguf.model import library, native_log

    llama = library()
    params = llama.llama_model_quantize_default_params()
    params.nthread = threads
    params.allow_requantize = True
    if file_type is None:
        params.only_copy = True
    else:
        params.ftype = file_type
    code = llama.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if code != 0:
        reason = native_log.take_errors() or f"llama.cpp returned {code}"
        raise ImpetusError(f"llama.cpp could not quantize {source.name}: {reason}")


def write_tokenizer(source: GgufSource, output: Path) -> None:
    """Write the tokenizer, chat templates, generation settings and a card with the license.

    Raises UnsupportedCapability if the tokens would differ from llama.cpp's.
    """
    from transformers import AutoTokenizer

    first, header = source.files[0], source.header
    made = AutoTokenizer.from_pretrained(
        first.parent, gguf_file=first.name, local_files_only=True, trust_remote_code=False
    )
    kind = header.text("tokenizer.ggml.model")
    pre = header.text("tokenizer.ggml.pre") if kind == "gpt2" else ""
    if kind == "llama":
        has_prefix = header.metadata.get("tokenizer.ggml.add_space_prefix") is not False
        use_llama_blanks(made.backend_tokenizer, has_prefix=has_prefix)
    with gguf_vocabulary(first) as vocabulary:
        match_gguf_tokenizer(made.backend_tokenizer, vocabulary, pre)
        ends = vocabulary.end_ids()
    made.save_pretrained(output)
    described = read_json(output / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "name_or_path", "chat_template"):
        described.pop(key, None)
    described["model_max_length"] = header.number(f"{header.architecture}.context_length", 0, 2**31)
    write_json(output / "tokenizer_config.json", described)
    _write_templates(header, output)
    _write_card(header, output)
    write_json(output / "generation_config.json", _generation_config(header, ends))


def _write_templates(header: GgufFile, output: Path) -> None:
    """Write the default chat template, and the named ones as transformers does."""
    (output / "chat_template.jinja").unlink(missing_ok=True)
    if template := header.text(_TEMPLATE):
        _write_text(output / "chat_template.jinja", template)
    for key in header.metadata:
        name = key.removeprefix(f"{_TEMPLATE}.")
        if name != key and _TEMPLATE_NAME.fullmatch(name) and header.text(key):
            folder = output / "additional_chat_templates"
            folder.mkdir(exist_ok=True)
            _write_text(folder / f"{name}.jinja", header.text(key))


def _write_card(header: GgufFile, output: Path) -> None:
    """Write a model card with the license that the GGUF file names, if any."""
    if license_ := header.text("general.license"):
        line = json.dumps(" ".join(license_.split())[:_LONGEST_LICENSE])
        _write_text(output / "README.md", f"---\nlicense: {line}\n---\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _generation_config(header: GgufFile, ends: tuple[int, ...]) -> dict[str, Any]:
    """Return the end tokens, the main one first, and the recommended sampling."""
    config: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        token_id = header.number(f"tokenizer.ggml.{key}_token_id", 0, 2**31)
        if token_id is not None:
            config[f"{name}_token_id"] = token_id
    main = header.number("tokenizer.ggml.eos_token_id", 0, 2**31)
    known = {*ends, *(() if main is None else (main,))}
    ordered = sorted(known, key=lambda each: (each != main, each))
    if ordered:
        config["eos_token_id"] = ordered if len(ordered) > 1 else ordered[0]
    for key, name in SAMPLING.items():
        value = header.metadata.get(f"general.sampling.{name}")
        if isinstance(value, float):
            config[key] = float(str(np.float32(value)))
        elif type(value) is int:
            config[key] = value
    if config.keys() & SAMPLING.keys():
        config["do_sample"] = True
    return config


def gguf_to_safetensors(job: Job, report: Report) -> None:
    """Write a Hugging Face folder with the weights dequantized, tensor by tensor.

    Raises BrokenModel, UnsupportedCapability, RequestError for weights that f16 cannot hold.
    """
    import torch

    torch.set_num_threads(job.threads)
    report(0.0, "reading the tokenizer")
    source = open_gguf(job)
    config = hf_config(source.header, source.shapes(), source.rope_freqs())
    write_tokenizer(source, job.output)
    dtype = DTYPES[job.quantization]
    write_tensors(
        job.output,
        lazy_tensors(source, dtype),
        metadata={"format": "pt"},
        on_progress=lambda share: report(0.1 + 0.9 * share, "dequantizing the weights"),
    )
    write_json(job.output / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})
    report(1.0, "done")


def lazy_tensors(source: GgufSource, dtype: str) -> Iterator[LazyTensor]:
    """Yield the tensors with transformers' names, dequantized to a floating type."""
    import torch

    short = {name: key for key, name in SAFETENSORS_DTYPES.items()}[dtype]
    wanted = getattr(torch, dtype)
    for gguf_name, shape in source.shapes().items():
        name = hf_name(gguf_name)
        if name is None:
            continue

        def pieces(
            gguf_name: str = gguf_name, name: str = name, shape: tuple[int, ...] = shape
        ) -> Iterator[Any]:
            heads = unpermuted_heads(source.header, gguf_name)
            for values in dequantized(source.tensors[gguf_name], shape, heads):
                yield raw_bytes(cast_checked(name, torch.from_numpy(values), wanted))

        yield LazyTensor(name, short, shape, pieces)


def dequantized(tensor: Any, shape: tuple[int, ...], heads: int) -> Iterator[NDArray[np.float32]]:
    """Yield a GGUF tensor in pieces of some rows; with `heads` in transformers' order of rows."""
    from gguf.quants import dequantize

    rows = head_rows(shape, heads) if heads else 1
    count = rows_at_once(shape, rows)
    for start in range(0, shape[0], count):
        values = dequantize(np.array(tensor.data[start : start + count]), tensor.tensor_type)
        if heads:
            values = unpermuted(values, rows)
        yield np.ascontiguousarray(values, np.float32)


def unpermuted(values: NDArray[Any], rows: int) -> NDArray[Any]:
    """Undo GGUF's reordering of Llama's rows in each head of `rows`; shape (rows, …)."""
    rest = values.shape[1:]
    pairs = values.reshape(-1, rows // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(values.shape)
