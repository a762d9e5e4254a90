"""The folders that users added at run time to those that are scanned, in a file of the data folder.

All functions block for a moment.
"""

import json
import logging
from functools import lru_cache
from pathlib import Path

from core.errors import ImpetusError, RequestError
from core.files import write_atomically
from core.settings import Settings
from core.units import MIB

logger = logging.getLogger(__name__)

MAX_ADDED = 200
_FILE = "model_folders.json"


def added_folders(settings: Settings) -> list[Path]:
    """Return the added folders, none if the file is damaged."""
    path = settings.home / _FILE
    try:
        with path.open("rb") as file:
            stored = json.loads(file.read(MIB))["folders"]
        folders = [Path(folder) for folder in stored if "\0" not in folder]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as problem:
        _warn_once(str(path), f"{type(problem).__name__}: {problem}")
        return []
    return [folder for folder in folders[:MAX_ADDED] if folder.is_absolute()]


@lru_cache(maxsize=8)
def _warn_once(path: str, problem: str) -> None:
    logger.warning("the model folders in %s are not scanned: %s", path, problem)


def add_folder(settings: Settings, folder: Path) -> None:
    """Have a folder scanned from now on.  Raises RequestError for too many, ImpetusError."""
    folders = added_folders(settings)
    if folder in folders:
        return
    if len(folders) >= MAX_ADDED:
        raise RequestError(
            f"{MAX_ADDED} folders were added already; remove some, or choose a folder around them.",
            param="path",
        )
    _write(settings, [*folders, folder])


def remove_folder(settings: Settings, folder: Path) -> bool:
    """Scan an added folder no more; nothing in it is changed.  Return whether it was one."""
    folders = added_folders(settings)
    if folder not in folders:
        return False
    _write(settings, [one for one in folders if one != folder])
    return True


def _write(settings: Settings, folders: list[Path]) -> None:
    content = json.dumps({"folders": [str(folder) for folder in folders]})
    try:
        write_atomically(settings.home / _FILE, content.encode())
    except OSError as problem:
        raise ImpetusError(
            f"The folder could not be stored in {settings.home / _FILE} ({problem.strerror}); make "
            "the data folder writable."
        ) from problem
