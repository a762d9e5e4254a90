"""Tells whether a folder has nothing but one model and what its repository had beside it."""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from backends.small_json import read_object
from catalog.models import ARRIVAL_RECORD, DOWNLOAD_RECORD
from core.errors import BrokenModel

_MAX_FILES = 10_000
# Folders of other programs, with whatever is in them.
_TOOLS = frozenset({".git", ".cache", "__pycache__"})
_NAMES = re.compile(
    r"(?:[\w.-]*config[\w.-]*|[\w.-]*tokenizer[\w.-]*|special_tokens_map|added_tokens|vocab|merges|"
    r"modules|params|tekken|chat_template\w*|[\w.-]*\.index|spiece|sentencepiece[\w.-]*|dtypes|"
    r"trainer_state|generation_config|quantize_config)\.(?:json|txt|model|jinja|tiktoken)"
    r"|(?:readme|licen[cs]e|notice|use_policy|acceptable_use_policy|modelfile)[\w.-]*"
    # Code of a model's own architecture, which is never run, and macOS' files.
    r"|(?:modeling|configuration|tokenization|processing)_\w+\.py|\.git\w+|\.ds_store|\._.*"
    # The same weights in the formats of other libraries.
    r"|(?:tf_model|flax_model|rust_model|pytorch_model|model|consolidated)[\w.-]*"
    r"\.(?:h5|msgpack|ot|bin|safetensors|pth|onnx|onnx_data(?:_\d+)?)",
    re.IGNORECASE | re.DOTALL,
)


def has_only_model(folder: Path, files: Collection[Path]) -> bool:
    """Return whether all that is in `folder` belongs to a model of `files`; blocks briefly.

    Unknown files are not the model's, whatever they are, nor is what cannot be listed.
    """
    own = {str(file) for file in files} | {str(folder / path) for path in recorded_files(folder)}
    try:
        for count, path in enumerate(_found(folder), start=1):
            is_known = str(path) in own or _NAMES.fullmatch(path.name) is not None
            if count > _MAX_FILES or not is_known:
                return False
    except OSError:
        return False
    return True


def _found(folder: Path) -> Iterator[Path]:
    """Yield the files and links below a folder, except those of tools.  Raises OSError."""

    def fail(problem: OSError) -> None:
        raise problem

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in _TOOLS]
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place) / name for name in (*names, *linked))


def recorded_files(folder: Path) -> list[str]:
    """Return the paths of what a download, upload or copy brought into a folder, and its record.

    Empty without a valid record.
    """
    for name in (DOWNLOAD_RECORD, ARRIVAL_RECORD):
        try:
            files = read_object(folder / name).get("files")
        except BrokenModel:
            continue
        if isinstance(files, list):
            found = [file.get("path") for file in files if isinstance(file, dict)]
            paths = [path for path in found if isinstance(path, str) and is_plain_path(path)]
            return [*paths, name]
    return []


def is_plain_path(path: str) -> bool:
    """Whether a path is relative, and stays in its folder."""
    return bool(path) and not Path(path).is_absolute() and ".." not in Path(path).parts
