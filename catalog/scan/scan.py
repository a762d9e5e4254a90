"""Bringing the catalog up to date with the model folders, the starters and the built-ins."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import assert_never

from backends.base import Backend, ModelInfo
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
from catalog.scan.identify import HasBuiltInModels, Outcome, Refused, Unknown, examine
from catalog.scan.provenance import converted_from
from catalog.scan.starters import STARTERS, InstalledStarter, installed_starter
from catalog.scan.walk import file_signature, walk
from catalog.store import CatalogStore
from core.settings import Settings

logger = logging.getLogger(__name__)

# Part of every fingerprint: raised when identification learns more, so that all is read again.
_READER_VERSION = 3


def scan(
    settings: Settings,
    store: CatalogStore,
    backends: Sequence[Backend],
    *,
    identify_file: Callable[[Path], Outcome] | None = None,
    clock: Callable[[], float] = time.time,
) -> ScanReport:
    """Look at every model folder and write what changed; blocks, for seconds on a large disk.

    `identify_file` says what a file is; by default the backends are asked in this process.

    Files that did not change are not opened.  Damaged ones are kept with the reason and tried
    again when they or their folder change; vanished ones are kept as missing.
    """
    identify_file = identify_file or (lambda path: examine(path, backends))
    run = _ScanRun({record.key: record for record in store.models()}, identify_file)
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
    report = store.record_scan(run.found, run.missing(), run.forgotten(), now=clock())
    return replace(report, skipped=tuple(found.skipped))


@dataclass(slots=True)
class _ScanRun:
    """One scan: what is known by key, and what becomes of it."""

    known: dict[str, ModelRecord]
    identify_file: Callable[[Path], Outcome]
    found: list[ScannedModel] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    claimed: set[str] = field(default_factory=set)

    def add_file(self, path: Path, source: Source, starter: InstalledStarter | None = None) -> None:
        """Take note of one file, opening it only if it is new or changed."""
        if os.path.realpath(path) in self.claimed:
            return
        record = self.known.get(str(path))
        try:
            if record is not None and _is_current(record, starter):
                self._claim(record.info)
                return
            before = file_signature(path)
            outcome = self.identify_file(path)
            if file_signature(path) != before:
                # It is being written: what is known stays, and the next scan looks again.
                self.seen.add(str(path))
                return
            if isinstance(outcome, Unknown):
                return
            self._add_outcome(outcome, path, source, starter)
        except OSError as error:
            _log_skipped(f"{path}: cannot be read ({error.strerror})")

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
        """Take note of a model without files."""
        key = record_key(info)
        record = self.known.get(key)
        self.seen.add(key)
        if record is None or record.info != info or record.state != "ok":
            self.found.append(ScannedModel(info, BuiltIn(), f"{_READER_VERSION}:"))

    def _claim(self, info: ModelInfo) -> None:
        self.seen.add(record_key(info))
        self.claimed.update(os.path.realpath(file) for file in info.files)

    def missing(self) -> list[str]:
        """Return the keys whose files are gone since the last scan."""
        return [
            key
            for key, record in self.known.items()
            if key not in self.seen and record.state != "missing" and not self._is_part(key)
        ]

    def forgotten(self) -> list[str]:
        """Return the keys of files that are part of another model by now."""
        return [key for key in self.known if key not in self.seen and self._is_part(key)]

    def _is_part(self, key: str) -> bool:
        return os.path.isabs(key) and os.path.realpath(key) in self.claimed


def _converted(info: ModelInfo, source: Source) -> Source:
    """Return where the files really come from, if they say that they were converted here."""
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
    """Return a text that changes when any of the model's files does.

    A refused model's folder counts too: the shard that was missing may have come.
    """
    signatures = [file_signature(file) for file in info.files]
    if is_refused:
        signatures.append(str(info.files[0].parent.stat().st_mtime_ns))
    return f"{_READER_VERSION}:" + ",".join(signatures)


def _is_current(record: ModelRecord, starter: InstalledStarter | None) -> bool:
    """Whether the catalog's entry still says what reading the files again would."""
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
    """Log a skipped path once, not with every scan."""
    logger.warning("skipped %s", line)
