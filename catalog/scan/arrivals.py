"""Tells whether a model's files are still being written."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from catalog.inspections import QUIET_S
from catalog.scan.packages import model_stem
from catalog.scan.surroundings import Surroundings

# An unfinished download that did not grow for as long has been given up.
_ABANDONED_S = 600.0
# Where huggingface_hub writes while it downloads into a plain folder; what it downloads into
# subfolders is in subfolders of this one.
_DOWNLOADS = Path(".cache", "huggingface", "download")
_MAX_RISE = 3


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Looks for signs of writing at `now`, in Unix seconds.

    `partial` are the folders with unfinished downloads, with the names of those.
    """

    around: Surroundings
    partial: Mapping[Path, Sequence[str]]
    now: float

    @staticmethod
    def reason(path: Path) -> str:
        """Return the reason why `path`, which changed while it was read, is not listed yet."""
        return f"{path.name} is arriving: it is still being written"

    def sign(self, path: Path, package: Path) -> str:
        """Return why the model of `path` is not complete yet; empty if nothing is being written.

        Raises OSError if the folder cannot be listed.
        """
        for download in self._downloads(path, package):
            if self._age_s(download) < _ABANDONED_S:
                return f"{path.name} is arriving: the download {download.name} is not finished"
        newest_s = self.around.newest_ns(path, package) / 1e9
        if 0 <= self.now - newest_s < QUIET_S:
            return self.reason(path)
        return ""

    def _downloads(self, path: Path, package: Path) -> Iterator[Path]:
        """Yield the unfinished downloads that may belong to the model of `path`."""
        is_folder = package.is_dir()
        folders = {path.parent, package} if is_folder else {path.parent}
        for folder in sorted(folders):
            for name in self.partial.get(folder, ()):
                if is_folder or name.startswith(model_stem(path).stem):
                    yield folder / name
            for around in (folder, *islice(folder.parents, _MAX_RISE)):
                yield from _in_folder(around / _DOWNLOADS / folder.relative_to(around))
        blobs = _blobs(path)
        if blobs is not None:
            yield from (blobs / name for name in self.partial.get(blobs, ()))

    def _age_s(self, path: Path) -> float:
        """Return the seconds since the last write; of a time in the future, as if long ago."""
        try:
            age_s = self.now - path.lstat().st_mtime
        except OSError:
            return _ABANDONED_S
        return age_s if age_s >= 0 else _ABANDONED_S


def _in_folder(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                if entry.name.endswith(".incomplete"):
                    yield Path(entry.path)
    except OSError:
        return


def _blobs(path: Path) -> Path | None:
    """Return the blobs of the cached repository that `path` is in, None outside of one."""
    for folder in path.parents:
        if folder.name == "snapshots":
            return folder.parent / "blobs"
    return None
