"""Reads the chat templates of a Hugging Face folder: the default one, and named ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.hf.header import broken, read_optional_json, read_text
from backends.prompt.named_templates import RAG, TOOL_USE
from core.units import MIB

# Source: `CHAT_TEMPLATE_DIR` of transformers.
TOOL_USE_FILE = f"additional_chat_templates/{TOOL_USE}.jinja"
RAG_FILE = f"additional_chat_templates/{RAG}.jinja"
_DEFAULT = "default"
_MAX_TEMPLATE_BYTES = MIB


@dataclass(frozen=True, slots=True)
class FolderTemplates:
    """A folder's templates; `tool_use` and `rag` are those, unless they equal the default."""

    default: str | None = None
    tool_use: str | None = None
    rag: str | None = None


def read_templates(path: Path, tokenizer_config: Mapping[str, Any]) -> FolderTemplates:
    """Return the templates from their own files, else from the tokenizer's configuration.

    Raises BrokenModel for one that is larger than 1 MiB.
    """
    value = read_optional_json(path / "chat_template.json").get("chat_template")
    value = tokenizer_config.get("chat_template") if value is None else value
    named = _by_name(value)
    default = _own_file(path / "chat_template.jinja")
    if default is None:
        default = named.get(_DEFAULT) or next(iter(named.values()), None)
        _check_size(path, default)
    others: list[str | None] = []
    for name, file in ((TOOL_USE, TOOL_USE_FILE), (RAG, RAG_FILE)):
        other = _own_file(path / file)
        if other is None:
            other = named.get(name)
            _check_size(path, other)
        others.append(None if other == default else other or None)
    return FolderTemplates(default or None, *others)


def _by_name(value: object) -> dict[str, str]:
    """Return the templates of a configuration: one text, or a list of named ones."""
    if isinstance(value, str):
        return {_DEFAULT: value}
    found: dict[str, str] = {}
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            found[str(entry.get("name"))] = entry["template"]
    return found


def _own_file(path: Path) -> str | None:
    try:
        return read_text(path, _MAX_TEMPLATE_BYTES)
    except FileNotFoundError:
        return None


def _check_size(path: Path, template: str | None) -> None:
    if len(template or "") > _MAX_TEMPLATE_BYTES:
        raise broken(
            path / "tokenizer_config.json", "its chat template is larger than the limit of 1 MiB"
        )
