"""Checks tokenizers and safetensors headers before an engine opens them; reads no weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from backends.base import ModelInfo
from core.errors import BrokenModel
from core.units import MIB, format_bytes

_MAX_TOKENIZER_BYTES = 64 * MIB
_LONGEST_PATTERN = 8192
_PROBE = "The sea, 1234 times: grüße 海 🎈\n\t if (x != y) { return a_b[0]; }  " * 60


def check_files(info: ModelInfo, on_stage: Callable[[str], None]) -> None:
    """Read what engines will read; calls `on_stage` with the name of each check before it starts.

    Raises BrokenModel.  A hostile file can hang or crash the process: call it in a limited child
    process.
    """
    for path in info.files:
        if path.name == "tokenizer.json":
            on_stage("its tokenizer.json")
            check_tokenizer(path)
        elif path.suffix == ".safetensors":
            on_stage(f"its weights {path.name}")
            check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Read a file's header with the safetensors library.  Raises BrokenModel."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            file.keys()
    except SafetensorError as problem:
        raise BrokenModel(
            f"{path.name} is damaged, download it again: {problem}", param="model"
        ) from problem


def check_tokenizer(path: Path) -> None:
    """Build the tokenizer and encode a test text.  Raises BrokenModel."""
    from tokenizers import Tokenizer

    if (size := path.stat().st_size) > _MAX_TOKENIZER_BYTES:
        raise BrokenModel(
            f"{path.name} is {format_bytes(size)}; the limit is "
            f"{format_bytes(_MAX_TOKENIZER_BYTES)}.",
            param="model",
        )
    try:
        text = path.read_text("utf-8")
        longest = max((len(pattern) for pattern in _patterns(json.loads(text))), default=0)
    except (ValueError, RecursionError) as problem:
        raise BrokenModel(f"{path.name} is not valid JSON: {problem}", param="model") from problem
    if longest > _LONGEST_PATTERN:
        raise BrokenModel(
            f"{path.name} has a regular expression of {longest} characters; the limit is "
            f"{_LONGEST_PATTERN}.",
            param="model",
        )
    try:
        tokenizer = Tokenizer.from_str(text)
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    except MemoryError:
        raise
    except BaseException as problem:
        # The library's panics derive from BaseException.
        raise BrokenModel(f"{path.name} cannot be used: {problem}", param="model") from problem
    if not ids:
        raise BrokenModel(f"{path.name} encodes a test text to no tokens.", param="model")


def _patterns(value: Any) -> Iterator[str]:
    """Yield every regular expression in a tokenizer.json."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "Regex" and isinstance(item, str):
                yield item
            elif key != "vocab":
                yield from _patterns(item)
    elif isinstance(value, list) and not (value and isinstance(value[0], str)):
        for item in value:
            yield from _patterns(item)
