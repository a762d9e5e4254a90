"""Moves deleted models into a bin for a day, restores them, and purges what is older."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import Any

from catalog.model_folder import has_only_model, is_plain_path, recorded_files
from catalog.models import PROVENANCE, BuiltIn, Converted, Local, ModelRecord, Package
from core.errors import NotFound, RequestError, Unavailable
from core.files import why, write_atomically
from core.units import MIB

KEPT_S = 24 * 3600.0
# Corrections of the clock are smaller.
_CLOCK_S = 3600.0
# Hidden, so that scans do not see what is in it; in the model's own folder, so that moving is
# renaming.
BIN_FOLDER = ".impetus-bin"
_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = MIB
_ID = re.compile(r"[0-9a-f]{16}")
_FOLDER_FORMATS = frozenset({"mlx", "safetensors", "pytorch", "onnx", "coreml"})


@dataclass(frozen=True, slots=True)
class BinEntry:
    """A deleted model: where its files were below `root`, and what its catalog entry had.

    `size_bytes` is what the disk gets back when the entry is purged.  `deleted_at` and `purge_at`
    are in Unix seconds.  `settings` are those that were set, by name.
    """

    id: str
    model_id: str
    root: str
    paths: tuple[str, ...]
    size_bytes: int
    deleted_at: float
    purge_at: float
    aliases: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The entry's folder in the bin."""
        return Path(self.root) / BIN_FOLDER / self.id


def check_deletable(record: ModelRecord, roots: Iterable[Path]) -> Path:
    """Return the model folder whose bin can take the model's files.

    Raises RequestError for a model that is not the user's own files in a model folder.
    """
    source, first = record.source, next(iter(record.info.files), None)
    reason = ""
    if isinstance(source, Package | BuiltIn) or first is None:
        reason = "it belongs to an installed package; IMPETUS_STARTERS=false hides starters"
    elif "snapshots" in first.parts:
        reason = "it is in a Hugging Face cache, whose files models share; use `hf cache rm`"
    elif first.parent.name == "blobs" and first.name.startswith("sha256-"):
        reason = "it is in Ollama's store, whose files models share; use `ollama rm`"
    elif not isinstance(source, Local | Converted) or Path(source.root) not in {
        Path(os.path.realpath(root)) for root in roots
    }:
        reason = "its folder is not one of the configured model folders"
    if reason or first is None or not isinstance(source, Local | Converted):
        raise RequestError(f"{record.id} cannot be deleted here: {reason}.", param="model")
    root = Path(source.root)
    outside = [file for file in record.info.files if not _is_inside(file, root)]
    if outside:
        raise RequestError(
            f"{record.id} cannot be deleted here: its file {outside[0].name} is outside of {root}.",
            param="model",
        )
    return root


def move_to_bin(
    record: ModelRecord, root: Path, others: Sequence[ModelRecord], now: float
) -> BinEntry:
    """Move the model's files into the bin of `root`; blocks briefly.

    The folder of a model that needs one goes as a whole if it has nothing else, such as another
    model or files of the user.  A link is moved, not its target.  Raises Unavailable if the files
    cannot be moved; then none is.
    """
    paths = _paths(record, root, others)
    settings = {name: value for name, value in asdict(record.settings).items() if value is not None}
    entry = BinEntry(
        id=secrets.token_hex(8),
        model_id=record.id,
        root=str(root),
        paths=tuple(str(path.relative_to(root)) for path in paths),
        size_bytes=sum(map(_freed_bytes, paths)),
        deleted_at=now,
        purge_at=now + KEPT_S,
        aliases=record.aliases,
        settings=settings,
    )
    try:
        entry.folder.mkdir(parents=True)
        _write(entry)
        _move(_moves(entry))
    except OSError as problem:
        shutil.rmtree(entry.folder, ignore_errors=True)
        raise Unavailable(
            f"{record.id} was not deleted: its files cannot be moved ({why(problem)}). Fix the "
            "permissions of its folder and try again.",
            param="model",
        ) from problem
    _remove_empty({path.parent for path in paths}, root)
    return entry


def _write(entry: BinEntry) -> None:
    write_atomically(entry.folder / _MANIFEST, json.dumps(asdict(entry)).encode())


def entries(roots: Iterable[Path]) -> list[BinEntry]:
    """Return what is in the bins, oldest first; blocks briefly."""
    found = [entry for root in roots for entry in _entries(Path(os.path.realpath(root)))]
    return sorted(found, key=lambda entry: (entry.deleted_at, entry.id))


def find(entry_id: str, roots: Iterable[Path]) -> BinEntry:
    """Return an entry.  Raises NotFound."""
    for entry in entries(roots):
        if entry.id == entry_id:
            return entry
    raise NotFound(f"There is nothing {entry_id[:100]!r} in the bin.", param="id")


def restore(entry: BinEntry) -> None:
    """Move the files back to where they were; blocks briefly.

    Raises RequestError if another file is there now, Unavailable if they cannot be moved.
    """
    # After a crash while they were moved some may still be in their place.
    moves = [(to, original) for original, to in _moves(entry) if os.path.lexists(to)]
    for _, original in moves:
        if os.path.lexists(original):
            raise RequestError(
                f"{entry.model_id} cannot be restored: {original} exists; move it away first.",
                param="id",
            )
    try:
        _move(moves)
    except OSError as problem:
        raise Unavailable(
            f"{entry.model_id} was not restored: its files cannot be moved ({why(problem)})."
        ) from problem
    shutil.rmtree(entry.folder, ignore_errors=True)
    _remove_empty({entry.folder.parent}, Path(entry.root))


def purge(entry: BinEntry) -> None:
    """Delete the files for good; blocks while they are deleted.  Raises Unavailable."""
    try:
        shutil.rmtree(entry.folder)
    except OSError as problem:
        raise Unavailable(
            f"{entry.model_id} was not purged from the bin: {why(problem)}."
        ) from problem
    _remove_empty({entry.folder.parent}, Path(entry.root))


def purge_expired(roots: Iterable[Path], now: float) -> list[BinEntry]:
    """Purge what was deleted more than a day ago; return it.  What cannot be purged stays."""
    purged = []
    for entry in entries(roots):
        if now < entry.deleted_at - _CLOCK_S:
            # The clock was set back: the day begins anew, rather than files being kept for years.
            with suppress(OSError):
                _write(replace(entry, deleted_at=now, purge_at=now + KEPT_S))
            continue
        if now - entry.deleted_at < KEPT_S:
            continue
        with suppress(Unavailable):
            purge(entry)
            purged.append(entry)
    return purged


def _paths(record: ModelRecord, root: Path, others: Sequence[ModelRecord]) -> list[Path]:
    """Return the files and folders that are the model's alone."""
    files = list(dict.fromkeys(record.info.files))
    folder = files[0].parent
    for parent in files[0].parents:
        if parent == root:
            break
        is_result = isinstance(record.source, Converted) and (parent / PROVENANCE).is_file()
        if parent.suffix.lower() == ".mlpackage" or is_result:
            folder = parent
    is_folder = isinstance(record.source, Converted) or record.info.format in _FOLDER_FORMATS
    taken = [file for other in others if other.id != record.id for file in other.info.files]
    is_own = (
        is_folder
        and folder != root
        and _is_inside(folder, root)
        and all(_is_inside(file, folder) for file in files)
        and not any(_is_inside(file, folder) for file in taken)
    )
    if is_own and (isinstance(record.source, Converted) or has_only_model(folder, files)):
        return [folder]
    gone = [*files, *_downloaded_with(files, root, taken)]
    return [file for file in dict.fromkeys(gone) if file not in taken and os.path.lexists(file)]


def _downloaded_with(files: Sequence[Path], root: Path, taken: Sequence[Path]) -> list[Path]:
    """Return what was downloaded together with a model, whose folder can then be made anew.

    Empty if another model is in that folder.
    """
    for folder in files[0].parents:
        if not folder.is_relative_to(root) or folder == root:
            break
        names = recorded_files(folder)
        if names:
            is_its_own = files[0].relative_to(folder).as_posix() in names
            if not is_its_own or any(_is_inside(file, folder) for file in taken):
                break
            return [folder / name for name in names if _is_inside(folder / name, folder)]
    return []


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether the path itself, be it a link, lies below the folder."""
    parent = Path(os.path.realpath(path.parent)) / path.name
    return parent.is_relative_to(Path(os.path.realpath(folder)))


def _freed_bytes(path: Path) -> int:
    """Return the bytes that the disk gets back; links and files with other names free none."""
    if path.is_dir() and not path.is_symlink():
        with os.scandir(path) as listing:
            return sum(_freed_bytes(Path(entry.path)) for entry in listing)
    status = path.lstat()
    is_last = S_ISREG(status.st_mode) and not S_ISLNK(status.st_mode) and status.st_nlink == 1
    return status.st_size if is_last else 0


def _moves(entry: BinEntry) -> list[tuple[Path, Path]]:
    """Return each file or folder with its place in the bin."""
    root = Path(entry.root)
    return [
        (root / path, entry.folder / f"{number}-{Path(path).name}"[:200])
        for number, path in enumerate(entry.paths)
    ]


def _move(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename all or none.  Raises OSError."""
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            done.append((source, target))
    except OSError:
        for source, target in reversed(done):
            with suppress(OSError):
                target.rename(source)
        raise


def _remove_empty(folders: Iterable[Path], root: Path) -> None:
    """Remove folders below `root` that became empty."""
    for folder in folders:
        current = folder
        while current != root and current.is_relative_to(root):
            try:
                current.rmdir()
            except OSError:
                break
            current = current.parent


def _entries(root: Path) -> Iterator[BinEntry]:
    folder = root / BIN_FOLDER
    if folder.is_symlink():
        return
    try:
        with os.scandir(folder) as listing:
            names = [
                entry.name
                for entry in listing
                if _ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return
    for name in names:
        entry = _read(root, name)
        if entry is not None:
            yield entry


def _read(root: Path, name: str) -> BinEntry | None:
    """Return the entry with this id; None if its manifest is damaged or leads elsewhere."""
    path = root / BIN_FOLDER / name / _MANIFEST
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        if path.is_symlink() or path.stat().st_size > _MAX_MANIFEST_BYTES:
            return None
        fields = json.loads(path.read_text())
        # The folder may have been moved together with its models.
        fields |= {"id": name, "root": str(root)}
        fields["paths"], fields["aliases"] = tuple(fields["paths"]), tuple(fields["aliases"])
        entry = BinEntry(**fields)
        if all(is_plain_path(one) for one in entry.paths):
            return entry
    return None
