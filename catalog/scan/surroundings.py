"""Digests of the files around a model that can change what an inspection says of it."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from stat import S_ISDIR

from catalog.changes import file_signature
from catalog.scan.packages import model_stem
from catalog.scan.walk import is_partial

# Files that describe a model: configuration, tokenizer, template, index, license, provenance.
_DESCRIBING = re.compile(
    r".*config.*\.json|tokenizer.*|.*tokens.*\.json|vocab.*|merges\.txt|.*\.(?:model|tiktoken)|"
    r".*\.jinja|chat_template.*|.*\.index\.json|modules\.json|params\.json|README\.md|provenance\.json|"
    r"Manifest\.json"
)
# Subfolders whose files belong to the model around them, such as 1_Pooling.
_MODULE = re.compile(r"\d+_\w+|additional_chat_templates")
# Formats that read nothing but their own files.
SINGLE = ("gguf",)
# Name, size, modification time in ns, and whether it is a link.
_Entry = tuple[str, int, int, bool]


class _Folder:
    """What one folder held when it was listed; what is derived from it is computed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with os.scandir(path) as listing:
            self.entries = sorted(_entries(listing))

    @cached_property
    def describing(self) -> list[_Entry]:
        """The files that describe a model."""
        return [entry for entry in self.entries if _DESCRIBING.fullmatch(entry[0])]

    @cached_property
    def modules(self) -> list[Path]:
        """The subfolders that belong to the model in this folder."""
        found = [self._path / name for name, _, _, _ in self.entries if _MODULE.fullmatch(name)]
        return [folder for folder in found if folder.is_dir()]

    @cached_property
    def by_stem(self) -> Mapping[Path, Sequence[_Entry]]:
        """The files of each model that is told by its name, as shards are."""
        found: dict[Path, list[_Entry]] = {}
        for entry in self.entries:
            found.setdefault(model_stem(self._path / entry[0]), []).append(entry)
        return found


@dataclass(slots=True)
class Surroundings:
    """Looks at folders once per scan; raises OSError for those that cannot be listed."""

    _known: dict[Path, _Folder] = field(default_factory=dict)

    def digest(self, files: Sequence[Path], format: str, package: Path | None) -> str:
        """Return a digest of what is around the model of `files`, empty if nothing matters.

        Around a model that is served it is what describes it.  `package` is that of a refused
        model: every file of it counts, because a missing part may have been added.
        """
        first = files[0]
        is_folder = package is not None and package.is_dir()
        if format in SINGLE and not is_folder:
            return _digest(self._parts(first)) if package is not None else ""
        seen = []
        for folder in self._folders(files):
            entries = self.listing(folder) if is_folder else self._folder(folder).describing
            if package is not None and folder == first.parent and not is_folder:
                entries = sorted({*entries, *self._parts(first)})
            seen += [(str(folder), entry) for entry in entries]
        return _digest(seen)

    def folder(self, folder: Path) -> str:
        """Return a digest of the names, sizes and times of a folder's files."""
        return _digest(self.listing(folder))

    def newest_ns(self, path: Path, package: Path) -> int:
        """Return the latest modification time, in ns, of the files of a package around `path`."""
        entries: Iterable[_Entry]
        if package.is_dir():
            folders = dict.fromkeys((package, path.parent))
            entries = [entry for folder in folders for entry in self.listing(folder)]
        else:
            entries = self._parts(path)
        return max((modified for _, _, modified, _ in entries), default=0)

    def listing(self, folder: Path) -> Sequence[_Entry]:
        """Return the files and folders in `folder`, in order."""
        return self._folder(folder).entries

    def _folder(self, path: Path) -> _Folder:
        known = self._known.get(path)
        if known is None:
            known = self._known[path] = _Folder(path)
        return known

    def _parts(self, path: Path) -> Sequence[_Entry]:
        """Return the files beside `path` that are parts of its model by their names, and itself."""
        return self._folder(path.parent).by_stem.get(model_stem(path), ())

    def _folders(self, files: Sequence[Path]) -> list[Path]:
        """Return the folders of the model's files, the one above the first, and its modules."""
        first = files[0].parent
        folders = [file.parent for file in files]
        if first.name == "onnx" or first.suffix.lower() == ".mlpackage":
            folders.append(first.parent)
        return list(dict.fromkeys((*folders, *self._folder(first).modules)))


def model_signature(files: Iterable[Path]) -> list[str]:
    """Return the signature of each file; that of a link itself if its target is missing."""
    return [_signature(file) for file in files]


def _signature(path: Path) -> str:
    try:
        return file_signature(path)
    except OSError:
        status = path.lstat()
        return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def _entries(listing: Iterable["os.DirEntry[str]"]) -> Iterator[_Entry]:
    for entry in listing:
        if entry.name.startswith(".") or is_partial(entry.name):
            continue
        try:
            status = entry.stat()
        except OSError:
            status = entry.stat(follow_symlinks=False)
        # What happens inside of a subfolder changes no model around it.
        is_folder = S_ISDIR(status.st_mode)
        size, modified = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
        yield entry.name, size, modified, entry.is_symlink()


def _digest(entries: object) -> str:
    return hashlib.sha256(repr(entries).encode("utf-8", "surrogateescape")).hexdigest()
