"""Describes the model in a Hugging Face folder: sizes, quantization and capabilities."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from backends.base import ModelInfo
from backends.hf.chat_templates import RAG_FILE, TOOL_USE_FILE
from backends.hf.config import (
    HEAD_KEYS,
    HEAD_WIDTH_KEYS,
    HIDDEN_KEYS,
    KV_HEAD_KEYS,
    LAYER_KEYS,
    HfFolder,
    read_folder,
    weight_files,
)
from backends.hf.header import (
    SafetensorsHeader,
    TensorEntry,
    broken,
    read_bytes,
    safetensors_header,
)
from backends.hf.input_limit import input_limit, position_offset
from backends.hf.kinds.other import other_kind, refusal
from backends.hf.kinds.text import refuse_other_kinds, reranks
from backends.prompt.infill import INFILL_NAMES, find_infill
from backends.prompt.named_templates import template_capabilities
from backends.sentence_files import settings_files, settings_root
from core.types import Capability
from core.units import KIB

__all__ = [
    "HfFolder",
    "SafetensorsHeader",
    "TensorEntry",
    "folder_info",
    "is_mlx",
    "quantization_of",
    "read_folder",
    "safetensors_header",
    "tokenizer_files",
    "weight_files",
]

Details: TypeAlias = Mapping[str, int | float | str | bool]

_MAX_NUMBER = 2**31 - 1
_MAX_LAYERS = 4096
_ADDED_TOKENS_BYTES = 512 * KIB
# The default of most transformers configurations that do not set the length.
_DEFAULT_CONTEXT = 2048
_CACHED = re.compile(r"models--(?:.+--)?([^/]+)")
# Folders of one training run, which say nothing about the model.
_CHECKPOINT = re.compile(
    r"((checkpoint|ckpt|epoch|global_step|iter|step)[-_]?\d+)"
    r"|((best|final|last|latest)([-_](checkpoint|model))?)|checkpoint",
    re.IGNORECASE,
)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
    TOOL_USE_FILE, RAG_FILE,
)  # fmt: skip
_OTHER_FILES = ("config.json", "generation_config.json")

# Name in `ModelInfo.details`: the keys that configurations use for it.
_NUMBERS = {
    "n_layer": LAYER_KEYS,
    "n_embd": HIDDEN_KEYS,
    "vocabulary_size": ("vocab_size", "padded_vocab_size"),
    "n_head": HEAD_KEYS,
    "n_head_kv": KV_HEAD_KEYS,
    "n_ff": ("intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "hidden_dim"),
    "sliding_window": ("sliding_window",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}
_LATENT = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# The kind of each layer, a list or a text of one letter a layer, where the number is not given.
_LAYER_KINDS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
_REQUIRED = ("n_layer", "n_embd", "vocabulary_size")
_LENGTHS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
    "seq_length", "max_seq_length", "context_length", "model_max_length",
)  # fmt: skip
_DTYPE_NAMES = {
    "F32": "f32", "F16": "f16", "BF16": "bf16", "F64": "f64", "I8": "int8", "U8": "int8",
    "F8_E4M3": "fp8", "F8_E5M2": "fp8", "F8_E4M3FNUZ": "fp8", "F8_E5M2FNUZ": "fp8", "F4": "fp4",
}  # fmt: skip


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Return the files in `folder` that the tokenizer and the chat template are read from."""
    return _existing(folder.absolute(), _TOKENIZER_FILES)


def _existing(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).is_file())


def is_mlx(folder: HfFolder, header: SafetensorsHeader) -> bool:
    """Whether the weights are quantized in MLX's layout: uint32 words with `scales` tensors."""
    says_so = _says_mlx(folder) or header.metadata.get("format") == "mlx"
    return says_so and any(
        entry.dtype == "U32" and f"{name.removesuffix('.weight')}.scales" in header.tensors
        for name, entry in header.tensors.items()
        if name.endswith(".weight")
    )


def _says_mlx(folder: HfFolder) -> bool:
    """Whether the configuration has settings of MLX's quantization."""
    quantization = folder.config.get("quantization")
    if not isinstance(quantization, dict):
        return False
    bits = quantization.get("bits")
    return bits is None or (type(bits) is int and 1 <= bits <= 16)


def quantization_of(bytes_by_dtype: Mapping[str, int]) -> str:
    """Return the name, for `ModelInfo`, of weights that are not packed, such as `bf16`.

    The dtype with the most bytes decides; `bytes_by_dtype` has safetensors' names.
    """
    dtype = max(bytes_by_dtype.items(), key=lambda item: item[1], default=("", 0))[0]
    return _DTYPE_NAMES.get(dtype, dtype.lower())


def folder_info(
    format: str,
    folder: HfFolder,
    weights: tuple[Path, ...],
    *,
    parameters: int,
    weights_bytes: int,
    quantization: str,
    details: Details | None = None,
) -> ModelInfo:
    """Describe the model of `weights` (its first file identifies it) in `folder`.

    `details` are added to the description's.  Raises BrokenModel for models that are not text
    models, and for invalid numbers in config.json.
    """
    if kind := other_kind(folder.config):
        raise broken(folder.path / "config.json", refusal(kind))
    refuse_other_kinds(folder)
    numbers = _numbers(folder)
    dtype = folder.config.get("dtype") or folder.config.get("torch_dtype")
    suffix = weights[0].suffix
    indexes = (f"model{suffix}.index.json", f"pytorch_model{suffix}.index.json")
    files = dict.fromkeys(
        (
            *weights,
            *_existing(folder.path, (*indexes, *_OTHER_FILES, *_TOKENIZER_FILES)),
            *settings_files(folder.path),
        )
    )
    return ModelInfo(
        format=format,
        name=_name(folder.path),
        architecture=_one_line(folder.model_type),
        quantization=quantization,
        files=tuple(files),
        size_bytes=sum(path.stat().st_size for path in files),
        parameters=parameters,
        context_length=_context_length(folder),
        capabilities=_capabilities(folder),
        license=_one_line(folder.license),
        chat_template=folder.chat_template,
        tool_template=folder.tool_template,
        rag_template=folder.rag_template,
        details={
            **numbers,
            "weights_bytes": weights_bytes,
            "torch_dtype": _one_line(dtype.removeprefix("torch."))
            if isinstance(dtype, str)
            else "",
            "is_encoder": folder.is_encoder,
            **(details or {}),
        },
    )


def _one_line(text: str) -> str:
    """Return `text` without control characters, truncated to 200 characters."""
    return "".join(char for char in text if char.isprintable()).strip()[:200]


def _name(folder: Path) -> str:
    """Return the repository's name for a Hugging Face cache, else the folder's name."""
    for part in reversed(folder.parts[-5:]):
        match = _CACHED.fullmatch(part)
        if match is not None:
            return _one_line(match[1])
    if _CHECKPOINT.fullmatch(folder.name):
        return _one_line(f"{folder.parent.name}-{folder.name}")
    is_inner = folder.name == "model" or settings_root(folder) != folder
    return _one_line(folder.parent.name if is_inner else folder.name)


def _capabilities(folder: HfFolder) -> frozenset[Capability]:
    if reranks(folder):
        return frozenset({Capability.RERANK})
    if folder.is_embedder:
        return frozenset({Capability.EMBEDDING})
    capabilities = {Capability.CHAT, Capability.COMPLETION}
    capabilities |= template_capabilities((folder.chat_template, folder.tool_template))
    names = _added_names(folder)
    if find_infill(lambda name: 0 if name in names else None) is not None:
        capabilities.add(Capability.INFILL)
    return frozenset(capabilities)


def _added_names(folder: HfFolder) -> frozenset[str]:
    """Return the fill-in-the-middle tokens among the added tokens."""
    listed = folder.tokenizer_config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        contents = (value.get("content") for value in listed.values() if isinstance(value, dict))
        return INFILL_NAMES & {content for content in contents if isinstance(content, str)}
    start = _tokenizer_start(folder)
    return frozenset(
        name for name in INFILL_NAMES if f'"{name}"' in start or json.dumps(name) in start
    )


def _tokenizer_start(folder: HfFolder) -> str:
    """Return the part of tokenizer.json before its vocabulary, which lists the added tokens."""
    try:
        start = read_bytes(
            folder.path / "tokenizer.json", _ADDED_TOKENS_BYTES, count=_ADDED_TOKENS_BYTES
        )
    except FileNotFoundError:
        return ""
    return start.partition(b'"vocab"')[0].decode("utf-8", "replace")


def _numbers(folder: HfFolder) -> dict[str, int]:
    """Return the validated sizes that the memory estimate needs."""
    found: dict[str, int] = {}
    for name, keys in _NUMBERS.items():
        value = _number(folder, keys, _MAX_LAYERS if name == "n_layer" else _MAX_NUMBER)
        if value is None and name == "n_layer":
            value = _listed_layers(folder)
        if not value and name in _REQUIRED:
            raise broken(
                folder.path / "config.json", f"it has no {keys[0]}, so it is not a text model"
            )
        if value is not None:
            found[name] = value
    heads = found.setdefault("n_head", 0)
    found.setdefault("n_head_kv", heads)
    found.setdefault("n_ff", 4 * found["n_embd"])
    if folder.config.get("use_sliding_window") is False:
        found.pop("sliding_window", None)
    if folder.config.get("multi_query") and not folder.config.get("new_decoder_architecture"):
        found["n_head_kv"] = 1
    width = _number(folder, HEAD_WIDTH_KEYS, _MAX_NUMBER)
    found["head_dim"] = width or (found["n_embd"] // heads if heads else 0)
    latent = _number(folder, ("kv_lora_rank",), _MAX_NUMBER)
    if latent:
        # The cache stores every head's keys and values, not the latent vector.
        parts = [_number(folder, (key,), _MAX_NUMBER) or 0 for key in _LATENT]
        found |= {"n_head_kv": heads, "head_dim": parts[0] + parts[1], "value_head_dim": parts[2]}
    return found


def _listed_layers(folder: HfFolder) -> int | None:
    """Return the number of layers of a configuration that only lists their kinds."""
    for key in _LAYER_KINDS:
        value = folder.config.get(key)
        if isinstance(value, list | str) and 0 < len(value) <= _MAX_LAYERS:
            return len(value)
    return None


def _number(folder: HfFolder, keys: tuple[str, ...], high: int) -> int | None:
    """Return the value of the first of `keys` that is set; of a list, its maximum.

    Raises BrokenModel.
    """
    for key in keys:
        value = folder.config.get(key)
        if value is None:
            continue
        each = value if isinstance(value, list) and value else [value]
        if not all(type(one) is int and 0 <= one <= high for one in each):
            raise broken(
                folder.path / "config.json",
                f"its {key} is {str(value)[:40]!r}, not an integer from 0 to {high}",
            )
        return int(max(each))
    return None


def _context_length(folder: HfFolder) -> int:
    """Return the trained context length in tokens."""
    length = _number(folder, _LENGTHS, _MAX_NUMBER) or _tokenizer_length(folder)
    length -= position_offset(folder)
    if length < 1:
        raise broken(folder.path / "config.json", f"its context length is {length} tokens")
    if folder.is_embedder or reranks(folder):
        length = input_limit(folder, length)
    return length


def _tokenizer_length(folder: HfFolder) -> int:
    """Return the tokenizer's length limit; a huge value there means that it has none."""
    length = folder.tokenizer_config.get("model_max_length")
    if isinstance(length, int) and 0 < length <= _MAX_NUMBER:
        return length
    return _DEFAULT_CONTEXT
