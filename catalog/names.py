"""Derives readable, stable model ids from file names, and finds similar ids; pure."""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator

_LONGEST_NAME = 96
_LONGEST_QUERY = 200
_NEAREST = 3
_EXTENSION = re.compile(
    r"\.(?:gguf|ggml|safetensors|bin|pt|pth|ckpt|npz|onnx|ort|mlmodel|mlmodelc|mlpackage|h5|keras|"
    r"tflite|litertlm|task|msgpack|llamafile|engine|plan|pte|nemo|mnn|pdmodel)$",
    re.IGNORECASE,
)
_SHARD = re.compile(r"[-._]\d{5}-of-\d{5}$")
_QUANTIZATION = re.compile(
    r"(?:^|[-._ ])(?:ud-|i1-)?"
    r"(?:i?q\d(?:_\w+|f16)?|tq\d_\d|b?f16|f32|fp16|fp32|mxfp4(?:_moe)?|nvfp4|\d{1,2}-?bit|u?int[48]|"
    r"gguf|mlx|onnx|coreml|awq|gptq)$",
    re.IGNORECASE,
)
# What exporters append to a file's name to tell its variants apart.
_VARIANT = re.compile(
    r"(?:[-._](?:quantized|q?u?int\d+|bnb4|o[1-4]|arm64|avx2|avx512|vnni|merged|ema|best|last|final|"
    r"\d{1,3}))+$",
    re.IGNORECASE,
)
# A folder of training output, which is named after the folder around it.
_CHECKPOINT = re.compile(r"(?:checkpoint|epoch|step|iter|global_step)[-_.]?\d+", re.IGNORECASE)
_CACHED = re.compile(r"(?:models|datasets|spaces)--(?:.+--)?(.+)", re.DOTALL)
# Their name in a cached repository says which of its models they are.
_SINGLE_FILE = (".gguf", ".ggml")
_HASH = re.compile(r"(?:sha256-)?[0-9a-f]{32,}")
_UNINFORMATIVE = frozenset({
    "", "model", "models", "ggml-model", "ggml", "gguf", "weights", "pytorch_model", "consolidated",
    "unnamed", "untitled", "main", "default", "blobs", "snapshots", "none", "manifest",
    "manifest.json", "decoder_model", "decoder_model_merged", "decoder_model_merged_quantized",
    "model_quantized", "pytorch", "safetensors", "tf_model", "data", "com.apple.coreml",
    "adapter_model", "adapter", "flax_model", "rust_model", "diffusion_pytorch_model", "original",
    "decoder_with_past_model", "encoder_model", "openvino_model", "openvino", "params",
    "pytorch_lora_weights", "coreml", "checkpoint", "optimizer", "float32_model", "float16_model",
    "model_index",
})  # fmt: skip


def slug(text: str) -> str:
    """Return `text` in lower case, reduced to a-z, 0-9, dot, underscore and hyphen.

    NFC and NFD give the same result; accents are removed, other letters become hyphens.
    """
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(char for char in plain if not unicodedata.combining(char)).lower()
    plain = re.sub(r"[^a-z0-9._-]+", "-", plain)
    return plain.strip("-._")[:_LONGEST_NAME].rstrip("-._")


def _without_suffixes(name: str) -> str:
    """Return a file or folder name without extension, shard number and quantization."""
    name = _SHARD.sub("", _EXTENSION.sub("", name))
    while (shorter := _QUANTIZATION.sub("", name)) != name:
        name = shorter
    return slug(name)


def _is_uninformative(name: str) -> bool:
    bare = _VARIANT.sub("", name)
    return name in _UNINFORMATIVE or bare in _UNINFORMATIVE or _HASH.fullmatch(name) is not None


def is_descriptive(file_name: str) -> bool:
    """Whether a file name identifies a model; a hash or `model.gguf` does not."""
    return not _is_uninformative(_without_suffixes(file_name))


def bare_name(path_parts: Iterable[str], title: str) -> str:
    """Return the model name for a file with these path parts, the file last.

    Tries the file name, then `title` from the file's metadata, then the nearest folder with a
    descriptive name.  In a Hugging Face cache the repository names the model, and a subfolder is
    appended; only GGUF files have names of their own there.
    """
    parts = list(path_parts)
    *folders, file = parts or [""]
    repository = _repository(folders)
    if repository is not None and not file.lower().endswith(_SINGLE_FILE):
        return repository
    for candidate in (file, repository or "", title):
        name = _without_suffixes(candidate)
        if not _is_uninformative(name) and not _CHECKPOINT.fullmatch(name):
            return name
    return next(_folder_names(folders), "model")


def tag_name(name: str) -> str:
    """Return the bare name that a model with an Ollama tag, such as `llama3.2:1b`, has here."""
    model, _, tag = name.partition(":")
    return _without_suffixes(model if tag in ("", "latest") else f"{model}-{tag}")


def _repository(folders: list[str]) -> str | None:
    """Return the name of the cached repository that the folders are in, None outside of one."""
    for index in range(len(folders) - 2, -1, -1):
        match = _CACHED.fullmatch(folders[index])
        if match is None or folders[index + 1] != "snapshots":
            continue
        inner = (_without_suffixes(folder) for folder in folders[index + 3 :])
        names = [_without_suffixes(match[1]), *inner]
        return slug("-".join(name for name in names if not _is_uninformative(name))) or None
    return None


def _folder_names(folders: list[str]) -> Iterator[str]:
    """Yield names from the nearest folder outwards; a checkpoint's includes its run's name."""
    for index in range(len(folders) - 1, max(len(folders) - 5, -1), -1):
        cached = _CACHED.fullmatch(folders[index])
        name = _without_suffixes(cached[1] if cached else folders[index])
        run = _without_suffixes(folders[index - 1]) if index else ""
        if _CHECKPOINT.fullmatch(name):
            yield name if _is_uninformative(run) else slug(f"{run}-{name}")
        elif not _is_uninformative(name):
            yield name


def model_id(name: str, format: str, quantization: str) -> str:
    """Return `<name>@<format>-<quantization>`, or `<name>@<format>` without a quantization."""
    suffix = slug(quantization)
    return f"{name}@{slug(format)}-{suffix}" if suffix else f"{name}@{slug(format)}"


def unique_id(base: str, taken: Collection[str]) -> str:
    """Return `base` or, if taken, the first free one of `base-2`, `base-3`, …"""
    candidate, number = base, 1
    while candidate in taken:
        number += 1
        candidate = f"{base}-{number}"
    return candidate


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three known ids similar to `name`, the most similar first."""
    wanted = name[:_LONGEST_QUERY].lower()
    scores = {}
    for known_id in known:
        matcher = difflib.SequenceMatcher(b=wanted, autojunk=False)
        ratios = []
        for text in (known_id, known_id.partition("@")[0]):
            matcher.set_seq1(text.lower())
            ratios.append(matcher.ratio() if matcher.real_quick_ratio() >= 0.5 else 0.0)
        scores[known_id] = max(ratios)
    likely = sorted((-score, known_id) for known_id, score in scores.items() if score >= 0.5)
    return [known_id for _, known_id in likely[:_NEAREST]]
