"""Lists the candidate model files in the model folders, with bounds on depth and number."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from catalog.names import is_descriptive
from catalog.scan import hub_cache, ollama
from catalog.scan.identify import passing_reason

MAX_DEPTH = 8
MAX_FILES = 10_000
_UNREADABLE = "cannot be read"
_OUTSIDE = "a link to a file outside the model folders"
_DANGLING = "a link whose target does not exist"
PARTIAL = (
    ".part", ".partial", ".incomplete", ".tmp", ".temp", ".download", ".crdownload", ".aria2",
    ".opdownload", ".!ut", ".!qb", ".bt!", ".filepart", ".downloadinprogress", ".downloading",
)  # fmt: skip
_MANIFEST = re.compile(r"manifest=([^=]+)=([^=]+)=[^=]+\.json", re.DOTALL)
_GGUF = ".gguf"
_OLLAMA_PARTIAL = "-partial"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be a model, and the model folder that contains it.

    `names` are the model's names in the store of another program, none if the path tells it, and
    `facts` what the store says of it: see `catalog.scan.ollama`.  `refusal` says why the file is
    not opened at all, empty for a regular file.
    """

    path: Path
    root: Path
    names: tuple[str, ...] = ()
    refusal: str = ""
    facts: Mapping[str, float | str] = field(default_factory=dict, hash=False)

    @property
    def facts_digest(self) -> str:
        """A text that changes with the facts, empty without any."""
        if not self.facts:
            return ""
        return hashlib.sha256(repr(sorted(self.facts.items())).encode()).hexdigest()[:16]


@dataclass(slots=True)
class WalkResult:
    """Candidates ordered by path; `skipped` lists paths with the reason.

    `unread` are the files and folders among them that exist and cannot be read for now.
    `partial` are the folders with unfinished downloads, with the names of those.  `folders` are
    those that were listed, with their modification times in ns.  `homes` are where links may lead.
    """

    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    partial: dict[Path, list[str]] = field(default_factory=dict)
    folders: dict[Path, int] = field(default_factory=dict)
    homes: tuple[Path, ...] = ()

    def is_unread(self, path: Path) -> bool:
        """Whether a file may be there although it was not found."""
        return any(path == one or path.is_relative_to(one) for one in self.unread)

    def leads_outside(self, path: Path) -> bool:
        """Whether a file is a link to one outside of the model folders."""
        if not path.is_symlink():
            return False
        target = Path(os.path.realpath(path))
        return not any(target.is_relative_to(home) for home in self.homes)

    def note_folder(self, path: Path) -> None:
        """Note a folder before it is listed: a file that comes later changes its time."""
        self.folders[path] = modified_ns(path)

    def skip(self, path: "Path | str", reason: str) -> None:
        """Add a path that is left out."""
        self.skipped.append(f"{_printable(Path(path))}: {reason}")


@dataclass(frozen=True, slots=True)
class _Found:
    """A folder's entry with the names that its store gives it, and what that says of it.

    Of several entries for one file only the first of each `scope` is used: cached revisions of a
    model may share a part of their weights.
    """

    entry: "os.DirEntry[str]"
    names: tuple[str, ...] = ()
    scope: str = ""
    facts: Mapping[str, float | str] = field(default_factory=dict)


def walk(roots: Sequence[Path]) -> WalkResult:
    """Collect the regular files under `roots`; blocks while folders are listed.

    A link to a file is followed if its target is inside a root.  Of several names for one file
    the most descriptive is used.  In a Hugging Face cache the links of the current revision stand
    for the blobs, in an Ollama store the manifests name them.  Linked folders and hidden or
    partial files are ignored.
    """
    found = WalkResult()
    resolved = list(dict.fromkeys(Path(os.path.realpath(root)) for root in roots))
    walker = _Walker(resolved, found)
    for root in resolved:
        found.note_folder(root)
    entries = [
        (item, root) for root in resolved if _is_folder(root, found) for item in walker.files(root)
    ]
    # Of several names for one file the first is used.
    entries.sort(key=lambda item: _descriptive_first(item[0]))
    links = [home for root in resolved for home in hub_cache.link_homes(root)]
    homes = found.homes = (*resolved, *links)
    seen: set[tuple[int, int, str]] = set()
    for item, root in entries:
        path = Path(item.entry.path)
        reason = _exclusion_reason(item, homes, seen)
        if reason is None:
            found.candidates.append(Candidate(path, root, item.names, facts=item.facts))
        elif reason:
            found.skip(path, reason)
            if reason.startswith(_UNREADABLE):
                found.unread.append(path)
            elif reason in (_OUTSIDE, _DANGLING):
                found.candidates.append(Candidate(path, root, item.names, reason))
    found.candidates.sort(key=lambda candidate: candidate.path)
    return found


def _is_folder(path: Path, found: WalkResult) -> bool:
    """Whether a folder can be listed; one on a disk that fails costs no other folder its models."""
    try:
        return path.is_dir()
    except OSError as error:
        found.skip(path, f"cannot be listed ({error.strerror})")
        found.unread.append(path)
        return False


def _descriptive_first(item: _Found) -> tuple[bool, bool, str]:
    entry = item.entry
    return not (item.names or is_descriptive(entry.name)), entry.is_symlink(), entry.path


class _Walker:
    """Yields the files of model folders; knows the stores of other programs."""

    def __init__(self, roots: Sequence[Path], found: WalkResult) -> None:
        self._roots = roots
        self._found = found

    def files(self, root: Path) -> Iterator[_Found]:
        """Yield the entries of a root and its subfolders, except the folders themselves."""
        for count, item in enumerate(self._files(root, 1), start=1):
            if count > MAX_FILES:
                self._found.skip(root, f"only the first {MAX_FILES:,} files are read")
                return
            yield item

    def _files(self, root: Path, depth: int) -> Iterator[_Found]:
        folders = [(root, depth)]
        while folders:
            folder, depth = folders.pop()
            if hub_cache.is_blob_store(folder):
                continue
            if hub_cache.is_repository(folder):
                yield from self._repository(folder, depth)
            elif ollama.is_store(folder):
                yield from self._ollama_store(folder)
            else:
                listing = self._listing(folder)
                prefixes = _cached_prefixes(entry.name for entry in listing)
                for entry in listing:
                    if not _is_subfolder(entry):
                        yield _Found(entry, _cached_name(entry.name, prefixes))
                    elif depth < MAX_DEPTH:
                        folders.append((Path(entry.path), depth + 1))
                    else:
                        self._found.skip(entry.path, f"nested deeper than {MAX_DEPTH} folders")

    def _listing(self, folder: Path) -> list["os.DirEntry[str]"]:
        """Return the entries of a folder that are neither hidden nor partial, in order."""
        self._found.note_folder(folder)
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            self._found.skip(folder, f"cannot be listed ({error.strerror})")
            if passing_reason(error):
                self._found.unread.append(folder)
            return []
        kept = []
        for entry in entries:
            if is_partial(entry.name):
                self._found.partial.setdefault(folder, []).append(entry.name)
            elif not entry.name.startswith("."):
                kept.append(entry)
        return kept

    def _repository(self, folder: Path, depth: int) -> Iterator[_Found]:
        """Yield the files of a cached repository's current revision, and older weights."""
        if not hub_cache.is_model_repository(folder):
            self._found.skip(folder, "a dataset or space, not a model")
            return
        for name in ("snapshots", "refs"):
            self._found.note_folder(folder / name)
        chosen = hub_cache.revisions(folder)
        if chosen.left_out:
            self._found.skip(folder, f"{chosen.left_out:,} older revisions are not read")
        # Only to notice unfinished downloads: the links stand for the blobs.
        self._listing(folder / "blobs")
        revisions = hub_cache.RevisionFilter()
        for snapshot in chosen.folders:
            for item in self._files(snapshot, depth + 2):
                relative = Path(item.entry.path).relative_to(snapshot)
                if revisions.keep(relative, item.entry):
                    is_single = revisions.is_current and hub_cache.is_single_file(relative)
                    yield _Found(item.entry, scope="" if is_single else str(snapshot))
            revisions.end_revision()

    def _ollama_store(self, folder: Path) -> Iterator[_Found]:
        """Yield the blobs of an Ollama store that may be models, with the names of their tags."""
        store = ollama.read_store(folder)
        for path in store.folders:
            self._found.note_folder(path)
        for path, (name, reason) in store.refused.items():
            root = next(root for root in self._roots if path.is_relative_to(root))
            self._found.candidates.append(Candidate(path, root, (name,), reason))
        for entry in self._listing(folder / "blobs"):
            if entry.name not in store.texts and not _is_subfolder(entry):
                facts = store.facts.get(entry.name, {})
                yield _Found(entry, store.names.get(entry.name, ()), facts=facts)


def _cached_prefixes(names: Iterable[str]) -> tuple[str, ...]:
    """Return what llama.cpp's cache puts before the names of repositories' files, longest first.

    Source: llama.cpp's common/download.cpp: files are `<owner>_<repository>_<file>`, manifests
    `manifest=<owner>=<repository>=<tag>.json`.
    """
    manifests = filter(None, map(_MANIFEST.fullmatch, names))
    return tuple(sorted({f"{found[1]}_{found[2]}_" for found in manifests}, key=len, reverse=True))


def _cached_name(name: str, prefixes: Sequence[str]) -> tuple[str, ...]:
    """Return the name of a file in llama.cpp's cache without its repository's, else nothing."""
    if not name.endswith(_GGUF):
        return ()
    prefix = next((each for each in prefixes if name.startswith(each)), "")
    return (name[len(prefix) : -len(_GGUF)],) if prefix else ()


def has_changed(folders: Mapping[Path, int]) -> bool:
    """Whether a file was added to one of the listed folders, or removed; blocks briefly."""
    return any(modified_ns(path) != known for path, known in folders.items())


def modified_ns(folder: Path) -> int:
    """Return a folder's modification time in ns, 0 if it is not there."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def is_partial(name: str) -> bool:
    """Whether a file name is that of an unfinished download."""
    lower = name.lower()
    return lower.endswith(PARTIAL) or (lower.startswith("sha256-") and _OLLAMA_PARTIAL in lower)


def finished_name(name: str) -> str:
    """Return the name that an unfinished download gets at its end, as far as its name tells."""
    suffix = next((each for each in PARTIAL if name.lower().endswith(each)), "")
    return name[: len(name) - len(suffix)]


def _is_subfolder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        # As a file it is skipped with the reason.
        return False


def _exclusion_reason(
    item: _Found, homes: Sequence[Path], seen: set[tuple[int, int, str]]
) -> str | None:
    """Return why a file is excluded, empty if not worth reporting; None if it is a candidate."""
    entry = item.entry
    try:
        status = entry.stat()
    except OSError as error:
        if passing_reason(error):
            return f"{_UNREADABLE} ({error.strerror})"
        return _DANGLING if entry.is_symlink() else "does not exist"
    target = Path(os.path.realpath(entry.path)) if entry.is_symlink() else None
    is_inside = target is None or any(target.is_relative_to(home) for home in homes)
    if not S_ISREG(status.st_mode):
        if target is not None and entry.is_dir():
            return "" if is_inside else "a link to a folder outside the model folders"
        return "not a regular file"
    if not is_inside:
        return _OUTSIDE
    identity = status.st_dev, status.st_ino, item.scope
    if identity in seen:
        return "" if status.st_nlink == 1 else "the same file under another name"
    if not _is_utf8(entry.path):
        return "its name is not UTF-8"
    if not os.access(entry.path, os.R_OK):
        return f"{_UNREADABLE} (no permission)"
    seen.add(identity)
    return None


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")
