"""Derives readable, stable model ids from file names, and finds similar ids; pure."""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable

_LONGEST_NAME = 96
_LONGEST_QUERY = 200
_NEAREST = 3
_EXTENSION = re.compile(
    r"\.(?:gguf|ggml|safetensors|bin|pt|pth|npz|onnx|mlmodel|mlpackage)$", re.IGNORECASE
)
_SHARD = re.compile(r"[-._]\d{5}-of-\d{5}$")
_QUANTIZATION = re.compile(
    r"(?:^|[-._ ])(?:ud-|i1-)?"
    r"(?:i?q\d(?:_\w+|f16)?|tq\d_\d|b?f16|f32|fp16|fp32|mxfp4(?:_moe)?|nvfp4|\d{1,2}-?bit|u?int[48]|"
    r"gguf|mlx|onnx|coreml|awq|gptq)$",
    re.IGNORECASE,
)
_HASH = re.compile(r"(?:sha256-)?[0-9a-f]{32,}")
_UNINFORMATIVE = frozenset({
    "", "model", "models", "ggml-model", "ggml", "gguf", "weights", "pytorch_model", "consolidated",
    "unnamed", "untitled", "main", "default", "blobs", "snapshots", "none", "manifest",
    "manifest.json", "decoder_model", "decoder_model_merged", "decoder_model_merged_quantized",
    "model_quantized", "pytorch", "safetensors", "tf_model", "data", "com.apple.coreml",
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
    return name in _UNINFORMATIVE or _HASH.fullmatch(name) is not None


def is_descriptive(file_name: str) -> bool:
    """Whether a file name identifies a model; a hash or `model.gguf` does not."""
    return not _is_uninformative(_without_suffixes(file_name))


def bare_name(path_parts: Iterable[str], title: str) -> str:
    """Return the model name for a file with these path parts, the file last.

    Tries the file name, then `title` from the file's metadata, then the nearest folder with a
    descriptive name.
    """
    parts = list(path_parts)
    *folders, file = parts or [""]
    hub_folders = [folder.removeprefix("models--").rpartition("--")[2] for folder in folders]
    for candidate in (file, title, *reversed(hub_folders[-4:])):
        name = _without_suffixes(candidate)
        if not _is_uninformative(name):
            return name
    return "model"


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
