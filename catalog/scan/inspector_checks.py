"""What a model's files must withstand before any engine opens them: pure reading, no weights."""

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
    """Read what engines will read, calling `on_stage` with what comes next.

    Raises BrokenModel.  A hostile file may take all processor time: call it in a process that
    may die.
    """
    for path in info.files:
        if path.name == "tokenizer.json":
            on_stage("its tokenizer.json")
            check_tokenizer(path)
        elif path.suffix == ".safetensors":
            on_stage(f"its weights {path.name}")
            check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Let the reference reader check a file's header.  Raises BrokenModel."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            file.keys()
    except SafetensorError as problem:
        raise BrokenModel(f"{path.name} is damaged: {problem}", param="model") from problem


def check_tokenizer(path: Path) -> None:
    """Build the tokenizer and encode a text with it.  Raises BrokenModel."""
    from tokenizers import Tokenizer

    if (size := path.stat().st_size) > _MAX_TOKENIZER_BYTES:
        raise BrokenModel(
            f"{path.name} has {format_bytes(size)}; at most "
            f"{format_bytes(_MAX_TOKENIZER_BYTES)} are read.",
            param="model",
        )
    try:
        text = path.read_text("utf-8")
        longest = max((len(pattern) for pattern in _patterns(json.loads(text))), default=0)
    except (ValueError, RecursionError) as problem:
        raise BrokenModel(f"{path.name} is not valid JSON: {problem}", param="model") from problem
    if longest > _LONGEST_PATTERN:
        raise BrokenModel(f"{path.name} has a pattern of {longest} characters.", param="model")
    try:
        tokenizer = Tokenizer.from_str(text)
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    except MemoryError:
        raise
    except BaseException as problem:
        # The library's own panics derive from BaseException.
        raise BrokenModel(f"{path.name} cannot be used: {problem}", param="model") from problem
    if not ids:
        raise BrokenModel(f"{path.name} makes no tokens of a text.", param="model")


def _patterns(value: Any) -> Iterator[str]:
    """Yield every regular expression of a tokenizer's description."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "Regex" and isinstance(item, str):
                yield item
            elif key != "vocab":
                yield from _patterns(item)
    elif isinstance(value, list) and not (value and isinstance(value[0], str)):
        for item in value:
            yield from _patterns(item)
