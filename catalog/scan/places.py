"""Finds the folders in which other programs keep models: Hugging Face, LM Studio, Ollama, …"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from backends.hf.header import read_text
from catalog.added_folders import added_folders
from core.errors import ImpetusError
from core.settings import Settings
from core.units import MIB

_MAX_POINTER_BYTES = 4096
# Where Ollama's installer for Linux lets its service keep models.
_OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")


def model_folders(
    settings: Settings,
    environment: Mapping[str, str] = os.environ,
    home: Path | None = None,
    platform: str = sys.platform,
) -> list[Path]:
    """Return the folders to scan: the server's own, the user's, and those of other programs.

    Folders of other programs are listed only where they exist.  Blocks briefly.
    """
    others = _of_programs(settings, environment, home, platform)
    return list(dict.fromkeys([*own_folders(settings), *filter(_is_folder, others)]))


def folder_owners(
    settings: Settings,
    environment: Mapping[str, str] = os.environ,
    home: Path | None = None,
    platform: str = sys.platform,
) -> dict[str, str]:
    """Return whose each folder is, by its real path: a program's, `impetus`, or `folder`.

    The last are those that the user named.  Blocks briefly.
    """
    own, *named = own_folders(settings)
    found = {
        **_of_programs(settings, environment, home, platform),
        **dict.fromkeys(named, "folder"),
        own: "impetus",
    }
    return {os.path.realpath(folder): owner for folder, owner in found.items()}


def _of_programs(
    settings: Settings, environment: Mapping[str, str], home: Path | None, platform: str
) -> dict[Path, str]:
    """Return where other programs may keep models, with the program; the first of a folder."""
    try:
        user = home or Path.home()
    except RuntimeError:
        return {}
    found = {
        "huggingface": lambda: _hugging_face(environment, user),
        "lmstudio": lambda: _lm_studio(environment, user),
        "ollama": lambda: _ollama(environment, user),
        "llama.cpp": lambda: _llama_cpp(environment, user, platform),
    }
    folders: dict[Path, str] = {}
    for name in settings.discover:
        for folder in found[name]():
            folders.setdefault(folder, name)
    return folders


def own_folders(settings: Settings) -> list[Path]:
    """Return the server's own model folder and those that the user named; blocks briefly."""
    return [settings.home / "models", *settings.models_path, *added_folders(settings)]


def _hugging_face(environment: Mapping[str, str], home: Path) -> list[Path]:
    """Source: huggingface_hub's constants."""
    caches = _variable(environment, "XDG_CACHE_HOME", home) or home / ".cache"
    base = _variable(environment, "HF_HOME", home) or caches / "huggingface"
    named = _variable(environment, "HF_HUB_CACHE", home)
    return [named or _variable(environment, "HUGGINGFACE_HUB_CACHE", home) or base / "hub"]


def _lm_studio(environment: Mapping[str, str], home: Path) -> list[Path]:
    """Its folder, the one that its settings name, and those of its older versions.

    Source: lmstudio-js, findLMStudioHome.
    """
    usual = home / ".lmstudio"
    base = _variable(environment, "LMSTUDIO_HOME", home) or _pointed_to(home) or usual
    folders = [base / "models", usual / "models", home / ".cache" / "lm-studio" / "models"]
    try:
        named = json.loads(read_text(base / "settings.json", MIB))["downloadsFolder"]
    except (OSError, ValueError, KeyError, TypeError, ImpetusError, RecursionError):
        return folders
    return [path, *folders] if (path := _absolute(named)) else folders


def _pointed_to(home: Path) -> Path | None:
    """Return the home that LM Studio noted, None without a valid note."""
    try:
        return _absolute(read_text(home / ".lmstudio-home-pointer", _MAX_POINTER_BYTES).strip())
    except (OSError, ValueError, ImpetusError):
        return None


def _absolute(text: object) -> Path | None:
    is_path = isinstance(text, str) and "\0" not in text and Path(text).is_absolute()
    return Path(str(text)) if is_path else None


def _ollama(environment: Mapping[str, str], home: Path) -> list[Path]:
    """Source: Ollama's envconfig, and its installer for Linux."""
    named = _variable(environment, "OLLAMA_MODELS", home)
    return [named] if named else [home / ".ollama" / "models", _OLLAMA_SERVICE]


def _llama_cpp(environment: Mapping[str, str], home: Path, platform: str) -> list[Path]:
    """Source: llama.cpp's common/common.cpp, fs_get_cache_directory."""
    named = _variable(environment, "LLAMA_CACHE", home)
    if named:
        return [named]
    if platform == "darwin":
        return [home / "Library" / "Caches" / "llama.cpp"]
    caches = _variable(environment, "XDG_CACHE_HOME", home) or home / ".cache"
    return [caches / "llama.cpp"]


def _variable(environment: Mapping[str, str], name: str, home: Path) -> Path | None:
    """Return the absolute path that a variable holds, None without one."""
    text = environment.get(name, "")
    if text == "~" or text.startswith("~/"):
        text = str(home) + text[1:]
    return Path(text) if text and Path(text).is_absolute() else None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # It may be there: the scan reports why it cannot be listed.
        return True
