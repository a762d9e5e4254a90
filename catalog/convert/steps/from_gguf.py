"""Converts GGUF to Hugging Face: dequantizes the weights, rebuilds and checks the tokenizer."""

import contextlib
import ctypes
import json
from pathlib import Path
from typing import Any

from backends.gguf.file import gguf_info
from backends.gguf.header import read_gguf
from catalog.convert.job import (
    Job,
    Report,
    read_json,
    weight_files,
    with_legacy_rope_keys,
    write_json,
)
from catalog.convert.steps.gguf_tokenizer import gguf_vocabulary, match_gguf_tokenizer
from core.errors import BrokenModel, ImpetusError

_SHARD_BYTES = "5GB"
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def single_file(job: Job) -> Path:
    """Return the source as one valid GGUF file, merging split files.  Raises BrokenModel."""
    files = weight_files(job, (".gguf",))
    gguf_info(files[0])
    if len(files) == 1:
        return files[0]
    merged = job.work / "merged.gguf"
    quantize_file(files[0], merged, file_type=None, threads=job.threads)
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


def write_tokenizer(source: Path, output: Path) -> None:
    """Write tokenizer.json, its configuration and the chat template of a GGUF file.

    Raises UnsupportedCapability if the tokens would differ from llama.cpp's.
    """
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True, trust_remote_code=False
    )
    header = read_gguf(source)
    with gguf_vocabulary(source) as vocabulary:
        match_gguf_tokenizer(made.backend_tokenizer, vocabulary, header.text("tokenizer.ggml.pre"))
    made.save_pretrained(output)
    described = read_json(output / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "name_or_path"):
        described.pop(key, None)
    described["model_max_length"] = header.number(f"{header.architecture}.context_length", 0, 2**31)
    write_json(output / "tokenizer_config.json", described)


def finish_config(output: Path, dtype: str) -> dict[str, Any]:
    """Complete the config.json that transformers wrote, for other readers; return it."""
    config = with_legacy_rope_keys(read_json(output / "config.json"))
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(key, None)
    config["dtype"] = config["torch_dtype"] = dtype
    write_json(output / "config.json", config)
    return config


def gguf_to_safetensors(job: Job, report: Report) -> None:
    """Write a Hugging Face folder with the weights dequantized to f32, then cast.

    Raises BrokenModel, UnsupportedCapability.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    torch.set_num_threads(job.threads)
    report(0.0, "reading the tokenizer")
    source = single_file(job)
    write_tokenizer(source, job.output)
    report(0.25, "dequantizing the weights")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
        )
    except json.JSONDecodeError as error:
        raise BrokenModel(
            f"The metadata of {job.name} is not valid JSON, the file may be damaged: {error}."
        ) from error
    dtype = DTYPES[job.quantization]
    # The model is still marked as quantized, and transformers would refuse to save it.
    model.hf_quantizer = None
    with contextlib.suppress(AttributeError):
        del model.config.quantization_config
    model.to(getattr(torch, dtype))
    report(0.8, "writing the weights")
    model.save_pretrained(job.output, max_shard_size=_SHARD_BYTES)
    finish_config(job.output, dtype)
    report(1.0, "done")
