"""Checks the names of files that come from outside: nothing leaves its folder; pure.

The names of a folder that a browser uploads are those of its files below it, such as
`model/config.json`; macOS gives them with decomposed characters (NFD).
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from catalog.scan.walk import is_partial
from core.errors import RequestError

# The scan reads folders up to eight deep; three of them are `models/uploads/NAME`.
MAX_PARTS = 6
MAX_PATH_BYTES = 512
# Of one name, on APFS and on Linux.
MAX_NAME_BYTES = 255
_SHOWN = 80
_JUNK_FOLDERS = frozenset({"__macosx"})
_JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
# PyTorch's files and .npz are zip archives too, under names of their own.
_ARCHIVES = (
    ".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".gz", ".bz2", ".xz",
    ".zst", ".7z", ".rar", ".dmg",
)  # fmt: skip
_FOLDER_MODELS = (".mlpackage", ".mlmodelc")
_SHARD = re.compile(r"[-._]\d{5}-of-\d{5}$")
_DRIVE = re.compile(r"[A-Za-z]:")


def checked_path(path: str, param: str = "path") -> str:
    """Return a relative path with `/` and composed characters (NFC).

    Raises RequestError for one that is not below its folder, too long or too deep.
    """
    composed = unicodedata.normalize("NFC", path)
    parts = composed.split("/")
    reason = _fault(composed, parts)
    if reason:
        raise RequestError(
            f"{_shown(path)} cannot be the path of a file of a model: {reason}.", param=param
        )
    return composed


def checked_name(name: str) -> str:
    """Return the name of a model's folder.  Raises RequestError."""
    composed = checked_path(name, "name")
    if "/" in composed or composed.startswith(".") or is_junk(composed):
        raise RequestError(
            f"{_shown(name)} cannot be the name of a model: it must be the name of one folder that "
            "is not hidden.",
            param="name",
        )
    if is_partial(composed):
        raise RequestError(
            f"{_shown(name)} cannot name a model: scans take it for an unfinished download.",
            param="name",
        )
    return composed


def _fault(path: str, parts: list[str]) -> str:
    """Return what is wrong with a path; empty if nothing is."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if size > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes"
    if len(parts) > MAX_PARTS:
        return f"it is nested deeper than {MAX_PARTS - 1} folders"
    if "\\" in path or _DRIVE.fullmatch(parts[0]):
        return "it is not a path of folders that are separated by /"
    if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in path):
        return "it has control characters"
    if any(part in ("", ".", "..") or part != part.strip() for part in parts):
        return "each part between / must be a name, without spaces around it"
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"a name in it is longer than {MAX_NAME_BYTES} bytes"
    return ""


def is_junk(path: str) -> bool:
    """Whether a file is left by a system and no part of a model; hidden files are as well."""
    *folders, file = path.casefold().split("/")
    if any(folder.startswith(".") or folder in _JUNK_FOLDERS for folder in folders):
        return True
    return file.startswith(".") or file in _JUNK_FILES or file in _JUNK_FOLDERS


def unusable(path: str) -> str:
    """Return why a file is not taken although its name is valid; empty if it is."""
    file = path.casefold()
    if file.endswith(_ARCHIVES):
        return "it is an archive; unpack it and choose the folder or the file of the model in it"
    if file.endswith(_FOLDER_MODELS):
        return "on its own it is no model; choose the whole folder of that name"
    if is_partial(PurePosixPath(path).name):
        return "it is an unfinished download; finish it first"
    return ""


def same_name(path: str) -> str:
    """Return a text that is equal for paths which some file system takes for the same one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", path).casefold())


def common_folder(paths: Iterable[str]) -> str:
    """Return the first folder that all paths are in, empty without one."""
    firsts = {path.partition("/")[0] if "/" in path else "" for path in paths}
    return firsts.pop() if len(firsts) == 1 else ""


def name_of_file(name: str) -> str:
    """Return a file's name without its ending and the number of a shard."""
    stem = PurePosixPath(name).stem
    return _SHARD.sub("", stem) or stem or name


def _shown(text: str) -> str:
    return repr(text[:_SHOWN] + ("…" if len(text) > _SHOWN else ""))
