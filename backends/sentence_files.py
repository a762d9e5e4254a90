"""Finds the files of a sentence-transformers model around the folder of its transformer."""

from pathlib import Path

from backends.small_json import read_json

_SETTINGS = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_OF_MODULES = ("config.json", "model.safetensors", "pytorch_model.bin")
_MAX_MODULES = 32


def settings_root(folder: Path) -> Path:
    """Return the folder with modules.json: `folder`, or the one around it that lists it.

    Older models keep the transformer in a folder of its own, such as `0_Transformer`.
    Raises BrokenModel for a damaged modules.json.
    """
    if (folder / "modules.json").is_file() or not (folder.parent / "modules.json").is_file():
        return folder
    return folder.parent if folder.name in _module_paths(folder.parent) else folder


def has_modules(folder: Path) -> bool:
    """Whether a modules.json describes the model in `folder`."""
    return (settings_root(folder) / "modules.json").is_file()


def settings_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of `folder`'s model that sentence-transformers reads besides weights."""
    root = settings_root(folder)
    places = [root / path for path in _module_paths(root) if path]
    found = [each / name for each in dict.fromkeys((root, folder)) for name in _SETTINGS]
    found += [each / name for each in places if each != folder for name in _OF_MODULES]
    return tuple(path for path in found if path.is_file())


def _module_paths(root: Path) -> list[str]:
    """Return the folders of the modules, as far as they are names of folders in `root`."""
    modules = read_json(root / "modules.json")
    entries = modules[:_MAX_MODULES] if isinstance(modules, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return [path for path in paths if isinstance(path, str) and _is_name(path)]


def _is_name(path: str) -> bool:
    return not any(char in path for char in "/\\\0") and path not in (".", "..")
