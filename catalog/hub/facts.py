"""Reads the facts that are asked of the hub's JSON, whatever else is in it; pure."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, cast

from core.types import Capability

Gate: TypeAlias = Literal["", "auto", "manual"]

_LONGEST_TEXT = 200
_MOST_TAGS = 500
_MOST = 2**63 - 1
# Bits per parameter of safetensors' types, as the hub names them.
_DTYPE_BITS = {
    "F64": 64, "I64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
_FORMAT_TAGS = {
    "gguf": "gguf", "mlx": "mlx", "safetensors": "safetensors", "onnx": "onnx", "coreml": "coreml",
    "pytorch": "pytorch",
}  # fmt: skip
_TASKS: Mapping[str, frozenset[Capability]] = {
    "text-generation": frozenset({Capability.COMPLETION}),
    "image-text-to-text": frozenset({Capability.COMPLETION}),
    "any-to-any": frozenset({Capability.COMPLETION}),
    "feature-extraction": frozenset({Capability.EMBEDDING}),
    "sentence-similarity": frozenset({Capability.EMBEDDING}),
    "text-ranking": frozenset({Capability.RERANK}),
}
_TOOLS = re.compile(r"\btools?\b")
_THINKING = re.compile(r"<think>|enable_thinking|reasoning_content")


def text(value: object, longest: int = _LONGEST_TEXT) -> str:
    """Return a string without control characters, cut to `longest`; empty for anything else."""
    found = value if isinstance(value, str) else ""
    return "".join(char for char in found[: longest * 2] if char.isprintable())[:longest]


def number(value: object) -> int:
    """Return a whole number from 0, 0 for anything else."""
    return value if type(value) is int and 0 <= value <= _MOST else 0


def mapping(value: object) -> Mapping[str, Any]:
    """Return a JSON object, empty for anything else."""
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def sequence(value: object) -> Sequence[Any]:
    """Return a JSON array, empty for anything else."""
    return value if isinstance(value, list) else ()


def date(value: object) -> datetime | None:
    """Return a time in UTC, None for anything else."""
    try:
        found = datetime.fromisoformat(text(value))
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def tags(value: object) -> tuple[str, ...]:
    """Return the tags of a repository."""
    return tuple(filter(None, map(text, sequence(value)[:_MOST_TAGS])))


def gate(value: object) -> Gate:
    """Return how access is granted; empty if the repository is not gated."""
    return "manual" if value == "manual" else "auto" if value else ""


def licence(names: Sequence[str], card: Mapping[str, Any]) -> str:
    """Return the licence that the card or the tags name, empty if neither does.

    The name of a licence that the Hub does not know stands in the card beside `other`.
    """
    stated = text(card.get("license")) or next(
        (tag.removeprefix("license:") for tag in names if tag.startswith("license:")), ""
    )
    return text(card.get("license_name")) or stated if stated in ("", "other") else stated


def formats(names: Sequence[str]) -> tuple[str, ...]:
    """Return the formats of this server that the tags name."""
    return tuple(format for tag, format in _FORMAT_TAGS.items() if tag in names)


def base_models(names: Sequence[str]) -> tuple[str, ...]:
    """Return the repositories that a model was made from."""
    found = (tag.split(":")[-1] for tag in names if tag.startswith("base_model:"))
    return tuple(dict.fromkeys(name for name in found if "/" in name))


def parameters(item: Mapping[str, Any]) -> int:
    """Return the number of parameters, 0 if the hub does not state it."""
    stated = mapping(item.get("safetensors")).get("total")
    return number(stated) or number(mapping(item.get("gguf")).get("total"))


def weights_bytes(item: Mapping[str, Any]) -> int:
    """Return the bytes of the safetensors weights, 0 if the hub does not state them."""
    by_type = mapping(mapping(item.get("safetensors")).get("parameters"))
    if not set(by_type) <= set(_DTYPE_BITS):
        return 0
    return sum(number(count) * _DTYPE_BITS[name] // 8 for name, count in by_type.items())


def chat_template(item: Mapping[str, Any]) -> str:
    """Return the chat template that the hub read from a GGUF header or a tokenizer."""
    settings = mapping(item.get("config"))
    template = (
        mapping(item.get("gguf")).get("chat_template")
        or settings.get("chat_template_jinja")
        or mapping(settings.get("tokenizer_config")).get("chat_template")
    )
    return template if isinstance(template, str) else ""


def capabilities(item: Mapping[str, Any]) -> frozenset[Capability]:
    """Return what the hub's facts say that a model can do; its files may say more."""
    found = set(_TASKS.get(text(item.get("pipeline_tag")), frozenset()))
    template = chat_template(item)
    if template or "conversational" in tags(item.get("tags")):
        found |= {Capability.CHAT, Capability.COMPLETION}
    if _TOOLS.search(template):
        found.add(Capability.TOOLS)
    if _THINKING.search(template):
        found.add(Capability.REASONING)
    return frozenset(found)
