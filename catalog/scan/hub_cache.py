"""Chooses the files of a Hugging Face cache that are models: those of the current revision.

A cached repository is a folder `models--<owner>--<name>` with `snapshots/<revision>/`, whose
files are links to `blobs/`, which are named by hashes.  `refs/main` names the revision of the
main branch.  Source: the documentation of huggingface_hub, "Understand caching".
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from backends.hf.header import read_text
from core.errors import ImpetusError

# Older revisions are read only for what the newer ones lack.
MAX_REVISIONS = 16
_MAX_SNAPSHOTS = 20_000
_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+", re.DOTALL)
_SHARED_BLOBS_MARKER = ".huggingface-shared-blobs"
_REVISION = re.compile(r"[\w.-]{1,200}")
_MAX_REF_BYTES = 1024
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)", re.DOTALL)
# A folder's weights in one of these suffixes are one model; any other file is one by itself.
_FOLDER_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".npz"})
_SINGLE_WEIGHTS = frozenset({".gguf", ".onnx", ".mlmodel"})


@dataclass(frozen=True, slots=True)
class Revisions:
    """A cached repository's snapshot folders, the current one first; `left_out` more exist."""

    folders: tuple[Path, ...]
    left_out: int


def is_repository(folder: Path) -> bool:
    """Whether `folder` is a repository of a Hugging Face cache that has a snapshot."""
    if _REPOSITORY.fullmatch(folder.name) is None:
        return False
    return any(True for _ in _snapshots(folder, limit=1))


def is_model_repository(folder: Path) -> bool:
    """Whether a cached repository has a model, not a dataset or a space."""
    return folder.name.startswith("models--")


def is_blob_store(folder: Path) -> bool:
    """Whether `folder` holds the blobs that all repositories of a cache share."""
    return folder.name == "blobs" and (folder / _SHARED_BLOBS_MARKER).is_file()


def link_homes(root: Path) -> tuple[Path, ...]:
    """Return the folders outside `root` that links in it may point to.

    They are the stores of the Hugging Face cache around a root that is inside of a repository.
    """
    for folder in (root, *root.parents):
        if _REPOSITORY.fullmatch(folder.name):
            return folder / "blobs", folder.parent / "blobs"
    return ()


def revisions(repository: Path) -> Revisions:
    """Return the snapshot folders: that of `refs/main` first, then the newest first."""
    main = _main_revision(repository)
    found = sorted(
        _snapshots(repository, limit=_MAX_SNAPSHOTS),
        key=lambda item: (item[0].name != main, -item[1], item[0].name),
    )
    folders = tuple(path for path, _ in found)
    return Revisions(folders[:MAX_REVISIONS], max(len(folders) - MAX_REVISIONS, 0))


def _snapshots(repository: Path, limit: int) -> Iterator[tuple[Path, int]]:
    """Yield up to `limit` snapshot folders with their modification times, in nanoseconds."""
    try:
        with os.scandir(repository / "snapshots") as listing:
            for entry in listing:
                if entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False).st_mtime_ns
                    limit -= 1
                if limit <= 0:
                    return
    except OSError:
        # `walk` lists the folder as any other, and reports why it cannot be read.
        return


def _main_revision(repository: Path) -> str:
    try:
        text = read_text(repository / "refs" / "main", _MAX_REF_BYTES).strip()
    except (OSError, ImpetusError):
        return ""
    return text if _REVISION.fullmatch(text) else ""


class RevisionFilter:
    """Leaves out what a newer revision of the same repository has too.

    Call `keep` for each file of each revision, the current revision first, and `end_revision`
    after each of them.
    """

    def __init__(self) -> None:
        self._whole: set[tuple[str, str]] = set()
        self._listed: dict[tuple[str, str], list[str]] = {}
        self.is_current = True

    def keep(self, relative: Path, entry: "os.DirEntry[str]") -> bool:
        """Whether the file `relative` to its snapshot is read; of older revisions only weights."""
        group = _group(relative)
        if group in self._whole:
            return False
        if group is not None and _exists(entry):
            self._listed.setdefault(group, []).append(relative.name)
        return self.is_current or group is not None

    def end_revision(self) -> None:
        """Remember what the revision had in full."""
        for group, names in self._listed.items():
            if _is_whole(names):
                self._whole.add(group)
        self._listed = {}
        self.is_current = False


def is_single_file(path: Path) -> bool:
    """Whether a model of this file's format is one file, whatever is beside it."""
    return path.suffix.lower() in _SINGLE_WEIGHTS


def _group(relative: Path) -> tuple[str, str] | None:
    """Return what identifies a model within a repository; None for a file that is not weights."""
    suffix = relative.suffix.lower()
    if suffix in _FOLDER_WEIGHTS:
        return str(relative.parent), suffix
    return (str(relative), suffix) if suffix in _SINGLE_WEIGHTS else None


def _exists(entry: "os.DirEntry[str]") -> bool:
    try:
        return S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


def _is_whole(names: Sequence[str]) -> bool:
    """Whether no shard is missing among the names of weights files."""
    shards: dict[tuple[str, str, str], set[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault((match[1], match[3], match[4]), set()).add(match[2])
    return all(len(numbers) == int(count) for (_, count, _), numbers in shards.items())
