"""Digests of the files around a model that can change what an inspection says of it."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR

from catalog.changes import file_signature
from catalog.scan.packages import model_stem
from catalog.scan.walk import is_partial

# Files that describe a model: configuration, tokenizer, template, index, license, provenance.
_DESCRIBING = re.compile(
    r".*config.*\.json|tokenizer.*|.*tokens.*\.json|vocab.*|merges\.txt|.*\.(?:model|tiktoken)|"
    r"chat_template.*|.*\.index\.json|modules\.json|params\.json|README\.md|provenance\.json|"
    r"Manifest\.json"
)
# Subfolders whose configuration belongs to the model around them, such as 1_Pooling.
_MODULE = re.compile(r"\d+_\w+")
# Formats that read nothing but their own files.
_SINGLE = ("gguf",)
# Name, size, modification time in ns, and whether it is a link.
_Entry = tuple[str, int, int, bool]


@dataclass(slots=True)
class Surroundings:
    """Looks at folders once per scan; raises OSError for those that cannot be listed."""

    _listings: dict[Path, list[_Entry]] = field(default_factory=dict)

    def digest(self, files: Sequence[Path], format: str, package: Path | None) -> str:
        """Return a digest of what is around the model of `files`, empty if nothing matters.

        Around a model that is served it is what describes it.  `package` is that of a refused
        model: every file of it counts, because a missing part may have been added.
        """
        is_folder = package is not None and package.is_dir()
        stem = model_stem(files[0])
        if format in _SINGLE and not is_folder:
            return self._shards(files[0]) if package is not None else ""
        seen = [
            (str(folder), entry)
            for folder in self._folders(files)
            for entry in self.listing(folder)
            if is_folder
            or _DESCRIBING.fullmatch(entry[0])
            or (package is not None and model_stem(files[0].with_name(entry[0])) == stem)
        ]
        return _digest(seen)

    def folder(self, folder: Path) -> str:
        """Return a digest of the names, sizes and times of a folder's files."""
        return _digest(self.listing(folder))

    def newest_ns(self, path: Path, package: Path) -> int:
        """Return the latest modification time, in ns, of the files of a package around `path`."""
        if not package.is_dir():
            stem = model_stem(path)
            times = [
                modified
                for name, _, modified, _ in self.listing(path.parent)
                if model_stem(path.with_name(name)) == stem
            ]
        else:
            folders = dict.fromkeys((package, path.parent))
            times = [entry[2] for folder in folders for entry in self.listing(folder)]
        return max(times, default=0)

    def listing(self, folder: Path) -> list[_Entry]:
        """Return the files and folders in `folder`, in order."""
        known = self._listings.get(folder)
        if known is None:
            with os.scandir(folder) as listing:
                known = self._listings[folder] = sorted(_entries(listing))
        return known

    def _shards(self, path: Path) -> str:
        stem = model_stem(path)
        entries = self.listing(path.parent)
        return _digest([one for one in entries if model_stem(path.with_name(one[0])) == stem])

    def _folders(self, files: Sequence[Path]) -> list[Path]:
        """Return the folders of the model's files, the one above the first, and its modules."""
        folders = list(dict.fromkeys(file.parent for file in files))
        first = files[0].parent
        if first.name == "onnx" or first.suffix.lower() == ".mlpackage":
            folders.append(first.parent)
        modules = [first / name for name, _, _, _ in self.listing(first) if _MODULE.fullmatch(name)]
        folders += [folder for folder in modules if folder.is_dir()]
        return list(dict.fromkeys(folders))


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
