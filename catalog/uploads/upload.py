"""An upload as it was announced: the files of one model; pure, JSON-serializable."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from catalog.uploads.names import (
    checked_name,
    checked_path,
    common_folder,
    is_junk,
    name_of_file,
    same_name,
    unusable,
)
from core.errors import BodyTooLarge, RequestError
from core.units import MIB, format_bytes

MAX_FILES = 1000
MAX_BYTES = 1 << 43
# What is sent at once; a connection that breaks loses at most as much.
CHUNK_BYTES = 8 * MIB
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Announced:
    """A file as its sender names it; `sha256` is hexadecimal, empty if it is not known."""

    path: str
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file of an upload; `number` is its place among the announced ones."""

    number: int
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Upload:
    """The files that become the model folder `name`; `ignored` are paths that are not taken.

    `created` is in Unix seconds.  Once it `is_finished` it takes no more bytes.
    """

    id: str
    name: str
    files: tuple[UploadFile, ...]
    ignored: tuple[str, ...]
    created: float
    is_finished: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> str:
        """Return the upload as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Upload":
        """Return the upload that `to_json` wrote."""
        values: Mapping[str, Any] = json.loads(text)
        files = tuple(UploadFile(**file) for file in values["files"])
        return cls(**{**values, "files": files, "ignored": tuple(values["ignored"])})


def announced(upload_id: str, files: Sequence[Announced], name: str, now: float) -> Upload:
    """Return the upload of these files, whose folder is `name` or, if empty, named after them.

    A folder around all files is left out.  Raises RequestError for names that lead elsewhere or
    clash, archives, and what is not a model's; BodyTooLarge over 8 TiB.
    """
    if not 0 < len(files) <= MAX_FILES:
        raise RequestError(
            f"{len(files):,} files were announced; an upload has 1 to {MAX_FILES:,}.",
            param="files",
        )
    paths = [checked_path(file.path, "files") for file in files]
    kept = [number for number, path in enumerate(paths) if not is_junk(path)]
    ignored = tuple(path for path in paths if is_junk(path))
    if not kept:
        raise RequestError(
            "All of these files are hidden or left by a system; choose the model's.", param="files"
        )
    around = common_folder(paths[number] for number in kept)
    chosen = tuple(
        UploadFile(
            number,
            paths[number].removeprefix(f"{around}/") if around else paths[number],
            files[number].size_bytes,
            _hash(files[number].sha256),
        )
        for number in kept
    )
    _check_files(chosen)
    usual = around or _name_of(chosen)
    upload = Upload(upload_id, checked_name(name or usual), chosen, ignored, now)
    if upload.size_bytes > MAX_BYTES:
        raise BodyTooLarge(
            f"The files have {format_bytes(upload.size_bytes)} together; an upload has at most "
            f"{format_bytes(MAX_BYTES)}."
        )
    return upload


def _hash(text: str) -> str:
    lower = text.lower()
    if lower and not _SHA256.fullmatch(lower):
        raise RequestError(
            "sha256 must have 64 hexadecimal digits; leave it out if it is not known.",
            param="files",
        )
    return lower


def _check_files(files: Sequence[UploadFile]) -> None:
    """Raise RequestError for files of which one folder cannot hold all."""
    names: dict[str, str] = {}
    folders: dict[str, str] = {}
    for file in files:
        if reason := unusable(file.path):
            raise RequestError(f"{file.path!r} is not taken: {reason}.", param="files")
        key = same_name(file.path)
        if key in names:
            raise RequestError(
                f"{names[key]!r} and {file.path!r} have the same name on some disks; rename one.",
                param="files",
            )
        names[key] = file.path
        for folder in PurePosixPath(file.path).parents:
            text = str(folder)
            if text != "." and folders.setdefault(same_name(text), text) != text:
                raise RequestError(
                    f"The folders {folders[same_name(text)]!r} and {text!r} have the same name on "
                    "some disks; rename one.",
                    param="files",
                )
    both = next((folders[key] for key in folders if key in names), None)
    if both is not None:
        raise RequestError(f"{both!r} is the name of a file and of a folder.", param="files")


def _name_of(files: Sequence[UploadFile]) -> str:
    """Return the name for files without a folder around them: that of the largest."""
    largest = max(files, key=lambda file: file.size_bytes)
    return name_of_file(PurePosixPath(largest.path).name)
