"""Scans model folders, starters and built-in models, and updates the catalog."""

import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import assert_never

from backends.base import Backend, ModelInfo
from catalog.changes import file_signature
from catalog.models import (
    BuiltIn,
    Converted,
    Local,
    ModelRecord,
    ScannedModel,
    ScanReport,
    Source,
    record_key,
)
from catalog.names import bare_name
from catalog.scan.identify import (
    HasBuiltInModels,
    Outcome,
    Refused,
    Uninspected,
    Unknown,
    examine,
    passing_reason,
)
from catalog.scan.notes import READER_VERSION, InspectionNotes
from catalog.scan.provenance import converted_from
from catalog.scan.starters import STARTERS, InstalledStarter, installed_starter
from catalog.scan.walk import WalkResult, walk
from catalog.store import CatalogStore
from core.settings import Settings

logger = logging.getLogger(__name__)


def scan(
    settings: Settings,
    store: CatalogStore,
    backends: Sequence[Backend],
    *,
    identify_file: Callable[[Path], Outcome] | None = None,
    clock: Callable[[], float] = time.time,
    urgent: Collection[str] = (),
) -> ScanReport:
    """Scan every model folder and store the changes; blocks, for seconds on a large disk.

    `identify_file` identifies a file; by default the backends do so in this process.

    Unchanged files are not opened, whether they are models or not.  Damaged files stay in the
    catalog with the reason and are read again when they or their folder change; deleted files stay
    as missing.  A file whose inspection failed is inspected again after a minute, later after up
    to an hour, and at once if its path is among `urgent`.
    """
    identify_file = identify_file or (lambda path: examine(path, backends))
    notes = InspectionNotes(store.inspections(), backends, clock(), urgent)
    run = _ScanRun({record.key: record for record in store.models()}, notes, identify_file)
    found = walk([settings.home / "models", *settings.models_path])
    for candidate in found.candidates:
        run.add_file(candidate.path, Local(str(candidate.root)))
    for starter in STARTERS if settings.starters else ():
        installed = installed_starter(starter)
        if installed is not None:
            run.add_file(installed.path, installed.package, installed)
    for backend in backends:
        if isinstance(backend, HasBuiltInModels):
            for info in backend.built_in():
                run.add_built_in(info)
    for line in found.skipped:
        _log_skipped(line)
    run.keep_unread(found)
    report = store.record_scan(
        run.found,
        run.missing(),
        run.forgotten(),
        now=clock(),
        inspections=notes.changed(),
        inspected=notes.outdated(),
    )
    return replace(report, skipped=tuple(found.skipped))


@dataclass(slots=True)
class _ScanRun:
    """The state of one scan: the known records by key, and what was found."""

    known: dict[str, ModelRecord]
    notes: InspectionNotes
    identify_file: Callable[[Path], Outcome]
    found: list[ScannedModel] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    claimed: set[str] = field(default_factory=set)

    def add_file(self, path: Path, source: Source, starter: InstalledStarter | None = None) -> None:
        """Add one file to the scan; opens it only if it is new or changed."""
        if os.path.realpath(path) in self.claimed:
            return
        key = str(path)
        record = self.known.get(key)
        try:
            if record is not None and _is_current(record, starter):
                self._claim(record.info)
                return
            before = file_signature(path)
            noted = self.notes.holding(path, before)
            if noted is not None:
                if noted.verdict == "uninspected":
                    self.seen.add(key)
                return
            outcome = self.identify_file(path)
            if file_signature(path) != before:
                # It is being written: keep the known record until the next scan.
                self.seen.add(key)
                return
            match outcome:
                case Unknown():
                    self.notes.note_unknown(path, before)
                case Uninspected(reason):
                    self.notes.note_failure(path, before, reason)
                    self.seen.add(key)
                    _log_skipped(f"{path}: {reason}; it will be tried again")
                case _:
                    self._add_outcome(outcome, path, source, starter)
        except OSError as error:
            if reason := passing_reason(error):
                self.seen.add(key)
                self._note_unread(path, reason)
            _log_skipped(f"{path}: cannot be read ({error.strerror})")

    def _note_unread(self, path: Path, reason: str) -> None:
        """Note that a file, or what belongs to it, cannot be read for now."""
        try:
            self.notes.note_failure(path, file_signature(path), reason)
        except OSError:
            self.notes.keep(str(path))

    def keep_unread(self, found: WalkResult) -> None:
        """Leave the records of files alone that exist and cannot be read for now."""
        for key in self.known:
            if key not in self.seen and found.unread and found.is_unread(Path(key)):
                self.seen.add(key)
                self.notes.keep(key)

    def _add_outcome(
        self,
        outcome: ModelInfo | Refused,
        path: Path,
        source: Source,
        starter: InstalledStarter | None,
    ) -> None:
        match outcome:
            case ModelInfo() as info:
                info = replace(info, name=bare_name(info.files[0].parts, info.name))
                source = _converted(info, source)
                reason = ""
            case Refused(format, reason):
                info = _refused_info(format, path)
            case _:
                assert_never(outcome)
        if starter is not None:
            info = starter.describe(info)
        if record_key(info) in self.seen:
            return
        self.found.append(
            ScannedModel(info, source, _fingerprint(info, is_refused=bool(reason)), reason)
        )
        self._claim(info)

    def add_built_in(self, info: ModelInfo) -> None:
        """Add a model without files to the scan."""
        key = record_key(info)
        record = self.known.get(key)
        self.seen.add(key)
        if record is None or record.info != info or record.state != "ok":
            self.found.append(ScannedModel(info, BuiltIn(), f"{READER_VERSION}:"))

    def _claim(self, info: ModelInfo) -> None:
        self.seen.add(record_key(info))
        self.claimed.update(os.path.realpath(file) for file in info.files)

    def missing(self) -> list[str]:
        """Return the keys whose files disappeared since the last scan."""
        return [
            key
            for key, record in self.known.items()
            if key not in self.seen and record.state != "missing" and not self._is_part(key)
        ]

    def forgotten(self) -> list[str]:
        """Return the keys of files that are now part of another model."""
        return [key for key in self.known if key not in self.seen and self._is_part(key)]

    def _is_part(self, key: str) -> bool:
        return os.path.isabs(key) and os.path.realpath(key) in self.claimed


def _converted(info: ModelInfo, source: Source) -> Source:
    """Return `Converted` if a provenance.json says so, else `source`."""
    if not isinstance(source, Local):
        return source
    model_id = converted_from(info.files[0], Path(source.root))
    return Converted(source.root, model_id) if model_id else source


def _refused_info(format: str, path: Path) -> ModelInfo:
    return ModelInfo(
        format=format,
        name=bare_name(path.parts, ""),
        architecture="",
        quantization="",
        files=(path,),
        size_bytes=path.stat().st_size,
        parameters=0,
        context_length=0,
        capabilities=frozenset(),
    )


def _fingerprint(info: ModelInfo, *, is_refused: bool) -> str:
    """Return a text that changes when any of the model's files changes.

    For a refused model it includes the folder: a missing shard may have been added.
    """
    signatures = [file_signature(file) for file in info.files]
    if is_refused:
        signatures.append(str(info.files[0].parent.stat().st_mtime_ns))
    return f"{READER_VERSION}:" + ",".join(signatures)


def _is_current(record: ModelRecord, starter: InstalledStarter | None) -> bool:
    """Whether the record still matches its files, so that they need not be read."""
    if record.state == "missing":
        return False
    if starter is not None and starter.describe(record.info) != record.info:
        return False
    return _is_unchanged(record)


def _is_unchanged(record: ModelRecord) -> bool:
    try:
        current = _fingerprint(record.info, is_refused=record.state == "refused")
    except OSError:
        return False
    return current == record.fingerprint


@lru_cache(maxsize=1024)
def _log_skipped(line: str) -> None:
    """Log a skipped path once per process, not in every scan."""
    logger.warning("skipped %s", line)
