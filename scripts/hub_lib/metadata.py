"""What the Hub reads from the files of a repository: card, configuration, headers, tags."""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from backends.gguf.header import read_gguf
from backends.hf.header import safetensors_header
from core.errors import ImpetusError, NotThisFormat
from scripts.hub_lib.repositories import Commit, HubFile, Repository

_FENCE = "---"


def card_data(commit: Commit) -> dict[str, Any]:
    """Return the YAML at the start of README.md, empty without one."""
    file = commit.files.get("README.md")
    if file is None:
        return {}
    _, fence, rest = file.source.read_text("utf-8", "replace").partition(f"{_FENCE}\n")
    text, end, _ = rest.partition(f"\n{_FENCE}")
    try:
        value = yaml.safe_load(text) if fence and end else {}
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def config(commit: Commit) -> dict[str, Any]:
    """Return what the Hub states of `config.json`: architectures, model_type, quantization."""
    file = commit.files.get("config.json")
    try:
        value = json.loads(file.source.read_bytes()) if file else {}
    except ValueError:
        return {}
    kept = ("architectures", "model_type", "auto_map", "quantization_config")
    return {key: value[key] for key in kept if key in value}


@cache
def _gguf(path: Path, _: int) -> dict[str, Any] | None:
    try:
        header = read_gguf(path)
    except (ImpetusError, NotThisFormat, OSError):
        return None
    found = {
        "total": header.parameters,
        "architecture": header.architecture,
        "context_length": header.number(f"{header.architecture}.context_length", 1, 2**31),
        "chat_template": header.text("tokenizer.chat_template"),
        "bos_token": header.bos_token,
        "eos_token": header.eos_token,
        "totalFileSize": header.size_bytes,
    }
    return {key: value for key, value in found.items() if value}


@cache
def _safetensors(path: Path, _: int) -> Counter[str] | None:
    try:
        header = safetensors_header(path)
    except (ImpetusError, NotThisFormat, OSError):
        return None
    counted: Counter[str] = Counter()
    for tensor in header.tensors.values():
        counted[tensor.dtype] += tensor.elements
    return counted


def gguf(commit: Commit) -> dict[str, Any] | None:
    """Return the Hub's `gguf`: totals and texts of the first GGUF file's header."""
    for file in commit.files.values():
        if file.path.endswith(".gguf"):
            return _gguf(file.source, _changed(file))
    return None


def safetensors(commit: Commit) -> dict[str, Any] | None:
    """Return the Hub's `safetensors`: elements of the top folder's files, by dtype."""
    total: Counter[str] = Counter()
    for file in commit.files.values():
        if file.path.endswith(".safetensors") and "/" not in file.path:
            total += _safetensors(file.source, _changed(file)) or Counter()
    return {"parameters": dict(total), "total": total.total()} if total else None


def _changed(file: HubFile) -> int:
    return file.source.stat().st_mtime_ns


def tags(repository: Repository, commit: Commit) -> list[str]:
    """Return the card's tags and those that the Hub derives: formats, licence, base model."""
    card = card_data(commit)
    found: list[str] = []
    library = card.get("library_name")
    found += [library] if isinstance(library, str) else []
    suffixes = {Path(path).suffix.lower() for path in commit.files}
    for suffix, tag in ((".safetensors", "safetensors"), (".gguf", "gguf"), (".onnx", "onnx"),
                        (".mlmodel", "coreml"), (".bin", "pytorch")):  # fmt: skip
        found += [tag] if suffix in suffixes else []
    found += [str(tag) for tag in card.get("tags") or ()]
    found += [card["pipeline_tag"]] if "pipeline_tag" in card else []
    base = card.get("base_model") or ()
    found += [f"base_model:{name}" for name in ([base] if isinstance(base, str) else base)]
    found += [f"license:{card['license']}"] if "license" in card else []
    return list(dict.fromkeys([*found, *repository.tags]))


def parameters(commit: Commit) -> int:
    """Return the number of parameters that the Hub knows, 0 if it knows none."""
    for found in (safetensors(commit), gguf(commit)):
        if found:
            return int(found["total"])
    return 0
