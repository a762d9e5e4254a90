"""Writes docs/configuration.md from the settings; `--check` only compares."""

import sys
import types
import typing
from pathlib import Path

from annotated_types import Ge, Gt, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from core.settings import ByteCount, Seconds, Settings
from core.units import format_bytes

CONFIGURATION = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

Written by `scripts/docs` from `core/settings.py`; do not edit.

Every setting is an environment variable and, by its short name, an entry under `args:` in
`serve_config.yaml`; the environment wins. A name nobody knows under `args:` and a value out of its
limits end the start with a message that names it. Bytes are written as `12GiB`, `500MB` or a plain
number.

| variable | in `args:` | type | default | meaning |
| --- | --- | --- | --- | --- |
"""
RAY = """
Ray's own settings are in `scripts/env`, one file for `scripts/serve` and for a `serve run` by hand.
"""
TYPE_NAMES: dict[object, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "folder",
    SecretStr: "secret text",
    ByteCount: "bytes",
    Seconds: "number",
}


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` return 1 when it is out of date."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: scripts/docs [--check]\n")
        return 2
    text = configuration_page()
    if not arguments:
        CONFIGURATION.write_text(text)
        return 0
    if CONFIGURATION.is_file() and CONFIGURATION.read_text() == text:
        return 0
    sys.stderr.write("docs/configuration.md is out of date: run scripts/docs\n")
    return 1


def configuration_page() -> str:
    """Return the page that belongs to the settings as they are now."""
    prefix = Settings.model_config.get("env_prefix", "")
    rows = [
        f"| `{prefix}{name.upper()}` | `{name}` | {_type(field)} | {_default(field)} "
        f"| {field.description} |\n"
        for name, field in Settings.model_fields.items()
    ]
    return INTRODUCTION + "".join(rows) + RAY


def _type(field: FieldInfo) -> str:
    annotation: object = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        (item,) = typing.get_args(annotation)
        return f"list of {'folders' if item is Path else 'names'}"
    is_bytes = any(m in typing.get_args(ByteCount) for m in field.metadata)
    name = "bytes" if is_bytes else TYPE_NAMES[annotation]
    return ", ".join([name, *_limits(field)])


def _limits(field: FieldInfo) -> list[str]:
    found = []
    for limit in field.metadata:
        if isinstance(limit, Ge):
            found.append(f"≥ {limit.ge}")
        elif isinstance(limit, Gt):
            found.append(f"> {limit.gt}")
        elif isinstance(limit, Le):
            found.append(f"≤ {limit.le}")
    return found


def _default(field: FieldInfo) -> str:
    if field.annotation is Path:
        return "`impetus` in the user's data folder"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, list):
        return f"`{','.join(map(str, value))}`" if value else "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    is_bytes = any(m in typing.get_args(ByteCount) for m in field.metadata)
    if is_bytes:
        return f"`{format_bytes(value).replace(' ', '')}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
