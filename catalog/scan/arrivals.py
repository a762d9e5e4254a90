"""Tells whether a model's files are still being written."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from catalog.inspections import QUIET_S
from catalog.scan.packages import model_stem, natural_format
from catalog.scan.surroundings import SINGLE, Surroundings
from catalog.scan.walk import finished_name

# An unfinished download that did not grow for as long has been given up.
_ABANDONED_S = 600.0
# How long a model of which only the download is there is not looked at; its end gives an event.
PROMISED_LOOK_S = 30.0
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
                return _unfinished(path, download)
        newest_s = self.around.newest_ns(path, package) / 1e9
        if 0 <= self.now - newest_s < QUIET_S:
            return self.reason(path)
        return ""

    def promised(self, listed: Collection[str]) -> Iterator[tuple[Path, str]]:
        """Yield models of which only unfinished downloads are there, each with the reason.

        `listed` are the paths of models that are known, and of files that are arriving.  Several
        GGUF models may be in one folder, of other formats one.
        """
        known: set[Path] | None = None
        for folder, names in self.partial.items():
            for download in (folder / name for name in names):
                path = folder / finished_name(download.name)
                format = natural_format(path)
                if not format or self._age_s(download) >= _ABANDONED_S:
                    continue
                if known is None:
                    known = {model_stem(Path(each)) for each in listed}
                    known |= {each.parent for each in known}
                place = model_stem(path) if format in SINGLE else folder
                if place not in known and not os.path.lexists(path):
                    known.add(place)
                    yield path, _unfinished(path, download)

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


def _unfinished(path: Path, download: Path) -> str:
    return f"{path.name} is arriving: the download {download.name} is not finished"


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
