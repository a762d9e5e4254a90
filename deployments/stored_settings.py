"""Settings that were changed through the API, kept in a file of the data folder."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.errors import RequestError, Unavailable
from core.files import lock_file, open_regular, why, write_atomically
from core.settings import NOT_STORED, Settings, load_settings

logger = logging.getLogger(__name__)

_MOST_BYTES = 256 * 1024
_LOCK_LIMIT_S = 5.0


def settings_file(home: Path) -> Path:
    """Return the path of the file, which need not exist."""
    return home / "settings.json"


def read_stored(home: Path) -> dict[str, Any]:
    """Return the stored settings by name, none without a file.

    Raises RequestError if the file cannot be read or has another form.
    """
    path = settings_file(home)
    try:
        with open_regular(path) as file:
            text = file.read(_MOST_BYTES + 1)
        stored = json.loads(text) if len(text) <= _MOST_BYTES else None
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as problem:
        raise RequestError(
            f"The settings in {path} cannot be read: {why(problem)}.", param="home"
        ) from problem
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise RequestError(
            f"{path} is no JSON object of settings: correct it, or delete it to use the defaults."
        )
    return stored


def known_stored(home: Path) -> dict[str, Any]:
    """Return what is stored of the settings that there are; blocks.

    Others, such as those of a later version, are left out.  Raises RequestError.
    """
    stored = read_stored(home)
    known = Settings.model_fields.keys() - NOT_STORED
    for name in sorted(stored.keys() - known):
        logger.warning("%r in %s is not a setting and has no effect", name, settings_file(home))
    return {name: value for name, value in stored.items() if name in known}


def load_with_stored(arguments: object) -> Settings:
    """Return the settings for the configuration file's `args`, the stored ones, the environment.

    Raises RequestError with one sentence that names every setting that is invalid.  Blocks.
    """
    settings = load_settings(arguments)
    stored = known_stored(settings.home)
    if not stored:
        return settings
    try:
        return load_settings(arguments, stored)
    except RequestError as problem:
        text = f"{problem.message} It is stored in {settings_file(settings.home)}."
        raise RequestError(text, param=problem.param) from None


def change_stored(home: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Replace the stored settings by what `change` makes of them, one process at a time; blocks.

    Raises what `change` does, with nothing stored, and Unavailable if the file cannot be written.
    """
    path = settings_file(home)
    try:
        with path.with_name(f".{path.name}.lock").open("a") as lock:
            lock_file(lock, _LOCK_LIMIT_S)
            content = json.dumps(dict(change(read_stored(home))), indent=2, ensure_ascii=False)
            write_atomically(path, content.encode() + b"\n")
    except OSError as problem:
        raise Unavailable(
            f"The settings cannot be stored in {path}: {why(problem)}.", retry_after_s=5
        ) from problem
