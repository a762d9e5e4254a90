"""Says what each conversion step supports, before it reads weights.

Used when a conversion is chosen, and again by the step itself.  A configuration that an exporter
would convert to other text is refused with the reason.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from backends.base import ModelInfo
from backends.gguf.header import GgufFile, read_gguf
from backends.hf.config import HfFolder, read_folder
from backends.mlx.limits import unread_setting
from backends.mlx.model import check_config, supports
from catalog.changes import file_signature
from catalog.convert.steps.coreml_decoder import decoder_of, longest_context
from catalog.convert.steps.gguf_config import unsupported_reason
from catalog.convert.steps.gguf_tokenizer import patterns_for, pre_name
from catalog.convert.steps.rotary import attention_window, rope_kind
from core.errors import ImpetusError, UnsupportedCapability
from core.units import MIB

# Architectures with llama's tensors; Hugging Face and GGUF use the same name for each.
LLAMA_FAMILY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Architectures whose graphs by onnxruntime-genai give PyTorch's tokens; those of others, such as
# olmo's, give other text or fail (measured with tiny models, see `tests/contract`).
ONNX_BUILT = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "ernie4_5", "hunyuan_v1_dense",
})  # fmt: skip
# The same for PyTorch's exporter, which writes f32 only.
ONNX_TRACED = ONNX_BUILT | {
    "phi", "phi3", "smollm3", "olmo", "olmo2", "nemotron", "stablelm",
}  # fmt: skip
# Reasons for PyTorch that say nothing about the model (see `backends.safetensors`).
_MLX_ABSENT = ("the MLX backend is not installed", "MLX cannot run here")
_ONNX_ROPES = ("default", "llama3")
_TOKENIZER_START_BYTES = 16 * MIB
_SPM = "llama"
# Tensor types that gguf-py decodes (Source: gguf.quants).
_DECODED = frozenset({
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k",
    "q6_k", "tq1_0", "tq2_0", "mxfp4", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s",
    "iq1_m", "iq4_nl", "iq4_xs",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Described:
    """What a source's files say: a folder's configuration, or a GGUF file's header."""

    folder: HfFolder | None = None
    header: GgufFile | None = None


def step_reason(info: ModelInfo, start: str, end: str, quantization: str = "") -> str:
    """Return why a step of a conversion of `info` would fail; empty if it should not.

    `start` and `end` are the step's formats.  Reads the configuration, or the GGUF header, and the
    start of tokenizer.json; blocks for some 50 ms the first time.
    """
    try:
        described = _described(info)
    except ImpetusError as error:
        return error.message.removesuffix(".")
    except OSError:
        # A file that is gone is told when the conversion starts.
        return ""
    if described.header is not None:
        if start == "gguf":
            return _gguf_source_reason(described.header, end)
        return _after_gguf_reason(described.header, end)
    if described.folder is None or start != "safetensors":
        return ""
    return _folder_reason(info, described.folder, end, quantization)


def _folder_reason(info: ModelInfo, folder: HfFolder, end: str, quantization: str) -> str:
    """Return why a folder of safetensors cannot be converted to the format `end`."""
    if end == "mlx":
        return _mlx_folder_reason(info, folder.config)
    if end not in ("gguf", "onnx", "coreml"):
        return ""
    if "wrapper_model_type" in folder.config:
        return "it is the language model of a larger model, which the conversion cannot take out"
    if end == "onnx":
        return onnx_reason(folder.config, quantization)
    if end == "coreml":
        return coreml_reason(folder)
    if reason := gguf_reason(folder.config):
        return reason
    if not (folder.path / "tokenizer.json").is_file():
        return "it has no tokenizer.json"
    return tokenizer_reason(_tokenizer_start(folder.path))


def _described(info: ModelInfo) -> _Described:
    """Read what describes the model.  Raises OSError, BrokenModel, NotThisFormat."""
    if not info.files:
        return _Described()
    first = info.files[0]
    if info.format == "gguf":
        return _read_header(first, file_signature(first))
    if info.format not in ("safetensors", "pytorch"):
        return _Described()
    config = first.parent / "config.json"
    return _read_config(first.parent, file_signature(config))


@lru_cache(maxsize=64)
def _read_header(path: Path, signature: str) -> _Described:
    del signature
    return _Described(header=read_gguf(path))


@lru_cache(maxsize=64)
def _read_config(folder: Path, signature: str) -> _Described:
    del signature
    return _Described(folder=read_folder(folder))


def _gguf_source_reason(header: GgufFile, end: str) -> str:
    if end == "gguf":
        return ""
    if reason := unsupported_reason(header):
        return reason
    if types := sorted(set(header.elements_by_type) - _DECODED):
        return f"its tensor type {types[0]} cannot be decoded"
    kind, pre = header.text("tokenizer.ggml.model"), header.text("tokenizer.ggml.pre")
    if kind != _SPM and patterns_for(pre or "default") is None:
        return f"its tokenizer ({kind[:40]} {pre[:40]}) has no known equivalent"
    return ""


def _mlx_folder_reason(info: ModelInfo, config: Mapping[str, Any]) -> str:
    """Return why a folder cannot be converted to MLX: what its inspection found decides."""
    choice = info.choice
    # MLX may be missing on this machine only.
    if choice is None or choice.reason.startswith(_MLX_ABSENT):
        return mlx_reason(config)
    if "mlx" in (choice.runtime, choice.alternative):
        return ""
    if "sliding" in choice.reason and attention_window(config) is not None:
        # The conversion limits the context to the window.
        return mlx_reason(config)
    return choice.reason.removesuffix(".")


def _after_gguf_reason(header: GgufFile, end: str) -> str:
    """Return why the folder that a GGUF file becomes cannot be converted further."""
    architecture = header.architecture
    kind = header.text(f"{architecture}.rope.scaling.type")
    is_linear = kind == "linear" or f"{architecture}.rope.scale_linear" in header.metadata
    scaling = {"rope_type": "linear"} if is_linear else None
    config = {"model_type": architecture, "rope_scaling": scaling}
    if end == "mlx":
        return mlx_reason(config)
    return onnx_reason(config, "") if end == "onnx" else ""


def gguf_reason(config: Mapping[str, Any]) -> str:
    """Return why a model cannot be written as GGUF; empty if it can."""
    model_type = str(config.get("model_type", ""))
    if model_type not in LLAMA_FAMILY:
        return f"the conversion does not support the architecture {model_type[:60]!r}"
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        return f"llama.cpp does not compute the activation {str(activation)[:50]!r} for it"
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        return "only a part of each head is rotated"
    if rope_kind(config) not in ("default", "linear", "llama3"):
        return f"the RoPE scaling {rope_kind(config)[:50]!r} is not supported"
    if model_type == "qwen3" and config.get("attention_bias"):
        return "llama.cpp does not add its attention's bias"
    return ""


def tokenizer_reason(tokenizer: Mapping[str, Any]) -> str:
    """Return why a tokenizer.json cannot be written as GGUF; empty if it can, or if it is unknown.

    Of the model only the keys before its vocabulary are needed.
    """
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        return ""
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        return "only byte-level BPE tokenizers are supported"
    if "pre_tokenizer" not in tokenizer:
        return ""
    try:
        pre_name(tokenizer["pre_tokenizer"])
    except UnsupportedCapability as error:
        return error.message.removesuffix(".")
    return ""


def _tokenizer_start(folder: Path) -> dict[str, Any]:
    """Return what tokenizer.json says before its vocabulary; empty if it cannot be read."""
    path = folder / "tokenizer.json"
    try:
        return _read_tokenizer_start(path, file_signature(path))
    except (OSError, ValueError, RecursionError):
        return {}


@lru_cache(maxsize=64)
def _read_tokenizer_start(path: Path, signature: str) -> dict[str, Any]:
    del signature
    with path.open("rb") as file:
        text = file.read(_TOKENIZER_START_BYTES).decode("utf-8", "replace")
    found: dict[str, Any] = {}
    _read_object(text, text.index("{"), found)
    return found


def _read_object(text: str, start: int, found: dict[str, Any]) -> bool:
    """Read an object's keys into `found` up to the vocabulary.  Returns whether it is reached.

    Raises ValueError for text that ends before, or is not JSON.
    """
    decoder, position = json.JSONDecoder(), start + 1
    while True:
        position = _skip(text, position, " \t\r\n,")
        if text[position : position + 1] in ("}", ""):
            return False
        key, position = decoder.raw_decode(text, position)
        position = _skip(text, position, " \t\r\n:")
        if key in ("vocab", "merges"):
            return True
        if key == "model" and text[position : position + 1] == "{":
            found["model"] = {}
            return _read_object(text, position, found["model"])
        found[key], position = decoder.raw_decode(text, position)


def _skip(text: str, position: int, characters: str) -> int:
    while text[position : position + 1] and text[position] in characters:
        position += 1
    return position


def mlx_reason(config: Mapping[str, Any]) -> str:
    """Return why mlx-lm cannot run a model; empty if it can.

    A window that it does not have is no reason, because the conversion limits the context to it.
    """
    model_type = str(config.get("wrapper_model_type") or config.get("model_type") or "")
    if not supports(model_type):
        return f"mlx-lm does not support the architecture {model_type[:60]!r}"
    try:
        check_config(config)
    except ImpetusError as error:
        return error.message.removesuffix(".")
    limited = {key: value for key, value in config.items() if key != "sliding_window"}
    return unread_setting(model_type, limited)


def onnx_reason(config: Mapping[str, Any], quantization: str) -> str:
    """Return why a model cannot be written as ONNX in a quantization; empty if it can."""
    model_type = str(config.get("model_type", ""))
    if rope_kind(config) not in _ONNX_ROPES:
        return f"the RoPE scaling {rope_kind(config)[:50]!r} is not supported"
    if model_type in ONNX_BUILT or (quantization in ("", "f32") and model_type in ONNX_TRACED):
        return ""
    if model_type in ONNX_TRACED:
        return f"the architecture {model_type[:60]!r} can be written in f32 only"
    return f"the conversion does not support the architecture {model_type[:60]!r}"


def coreml_reason(folder: HfFolder) -> str:
    """Return why a model cannot be written as Core ML; empty if it can."""
    try:
        decoder_of(folder, longest_context(folder))
    except ImpetusError as error:
        return error.message.removesuffix(".")
    return ""
