"""Reads small JSON files beside a model, with a size limit."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from core.errors import BrokenModel

_MAX_BYTES = 1024 * 1024


def read_object(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file, empty if there is no file.  Raises BrokenModel."""
    value = read_json(path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BrokenModel(f"{path.name} is not a JSON object.", param="model")
    return value


def read_json(path: Path) -> Any:
    """Return the JSON in a file, None if there is no file; never waits for a pipe's writer.

    Raises BrokenModel.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BrokenModel(f"{path.name} is not a regular file.", param="model")
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BrokenModel(
            f"{path.name} cannot be read ({error.strerror}).", param="model"
        ) from error
    if len(data) > _MAX_BYTES:
        raise BrokenModel(f"{path.name} is larger than the limit of 1 MiB.", param="model")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenModel(
            f"{path.name} is not valid JSON; download it again.", param="model"
        ) from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
