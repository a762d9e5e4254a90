"""Encodes and decodes model descriptions and sources as JSON for the catalog's rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import assert_never

from backends.base import ModelInfo, RuntimeChoice
from catalog.models import BuiltIn, Converted, Local, Package, Source
from core.types import Capability


def info_to_json(info: ModelInfo) -> str:
    """Return a model's description as JSON; equal descriptions give equal text."""
    fields = {
        "format": info.format,
        "name": info.name,
        "architecture": info.architecture,
        "quantization": info.quantization,
        "files": [str(file) for file in info.files],
        "size_bytes": info.size_bytes,
        "parameters": info.parameters,
        "context_length": info.context_length,
        "capabilities": sorted(info.capabilities),
        "license": info.license,
        "chat_template": info.chat_template,
        "tool_template": info.tool_template,
        "rag_template": info.rag_template,
        "details": dict(info.details),
        "choice": None if info.choice is None else asdict(info.choice),
    }
    return json.dumps(fields, sort_keys=True)


def info_from_json(text: str) -> ModelInfo:
    """Return the description that `info_to_json` wrote."""
    fields = json.loads(text)
    fields["files"] = tuple(Path(file) for file in fields["files"])
    fields["capabilities"] = frozenset(Capability(name) for name in fields["capabilities"])
    choice = fields.get("choice")
    fields["choice"] = None if choice is None else RuntimeChoice(**choice)
    return ModelInfo(**fields)


def source_to_json(source: Source) -> str:
    """Return a model's source as JSON."""
    match source:
        case Local(root):
            fields = {"kind": "local", "root": root}
        case Package(distribution, version):
            fields = {"kind": "package", "distribution": distribution, "version": version}
        case Converted():
            fields = {"kind": "converted", **asdict(source)}
        case BuiltIn():
            fields = {"kind": "built-in"}
        case _:
            assert_never(source)
    return json.dumps(fields, sort_keys=True)


def source_from_json(text: str) -> Source:
    """Return the source that `source_to_json` wrote."""
    fields = json.loads(text)
    match fields["kind"]:
        case "local":
            return Local(fields["root"])
        case "package":
            return Package(fields["distribution"], fields["version"])
        case "converted":
            # Older rows have no choices and no quality.
            del fields["kind"]
            return Converted(**fields)
        case _:
            return BuiltIn()
