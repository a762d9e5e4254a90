"""One scan: which files are inspected, and which models and refusals come of them."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import assert_never

from backends.base import ModelInfo
from backends.prompt.named_templates import template_capabilities
from catalog.changes import content_digest, file_signature, size_of
from catalog.models import (
    CONTENT,
    OTHER_NAMES,
    STORE_FACTS,
    BuiltIn,
    Converted,
    Local,
    ModelRecord,
    ScannedModel,
    Source,
    record_key,
    unread_info,
)
from catalog.names import bare_name
from catalog.scan.arrivals import Arrivals
from catalog.scan.identify import Outcome, Refused, Uninspected, Unknown, passing_reason
from catalog.scan.notes import READER_VERSION, InspectionNotes
from catalog.scan.ollama import CHAT_TEMPLATE, LICENSE
from catalog.scan.packages import Packages, is_part, natural_format
from catalog.scan.provenance import provenance_of
from catalog.scan.starters import InstalledStarter
from catalog.scan.surroundings import model_signature
from catalog.scan.walk import Candidate, WalkResult
from core.types import Capability

logger = logging.getLogger(__name__)

_MANIFEST = "Manifest.json"
_LINK_OUT = (
    "Its file {} is a link to a file outside the model folders; put the file itself here, or add "
    "its folder to IMPETUS_MODELS_PATH."
)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A refused file of a package; `before` is its signature when it was inspected."""

    candidate: Candidate
    refused: Refused
    before: str
    starter: InstalledStarter | None = None

    @property
    def importance(self) -> tuple[bool, bool, bool, bool, str]:
        """Sort key: the file that stands for its package, and says why it is refused, first."""
        path = self.candidate.path
        is_inner = path.name != _MANIFEST
        is_unopened = bool(self.candidate.refusal)
        return is_part(path), self.refused.is_guess, is_unopened, is_inner, str(path)


@dataclass(slots=True)
class ScanRun:
    """The state of one scan: the known records by key, and what was found."""

    known: dict[str, ModelRecord]
    notes: InspectionNotes
    identify_file: Callable[[Path], Outcome]
    walked: WalkResult
    found: list[ScannedModel] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    claimed: set[str] = field(default_factory=set)
    _packages: Packages = field(default_factory=Packages)
    _refusals: dict[Path, list[_Refusal]] = field(default_factory=dict)
    # Packages with a model that is served, and those whose refusal is known and still holds.
    _served: set[Path] = field(default_factory=set)
    _refused: set[Path] = field(default_factory=set)
    _first_files: set[str] = field(default_factory=set)

    def add_file(self, candidate: Candidate, starter: InstalledStarter | None = None) -> None:
        """Add one file to the scan; opens it only if it is new or changed."""
        path = candidate.path
        if self._is_claimed(path):
            return
        key = str(path)
        record = self.known.get(key)
        try:
            if record is not None and self._is_current(record, candidate, starter):
                self._claim(record.info, candidate, is_refused=record.state == "refused")
                return
            if candidate.refusal:
                self._refuse_unopened(candidate)
                return
            before = file_signature(path)
            noted = self.notes.holding(path, before)
            if noted is not None:
                if noted.verdict == "uninspected":
                    self.seen.add(key)
                return
            if self._is_still_arriving(candidate, before):
                self.seen.add(key)
                return
            self._inspect(candidate, before, starter)
        except OSError as error:
            if reason := passing_reason(error):
                self.seen.add(key)
                self._note_unread(path, reason)
            log_skipped(f"{path}: cannot be read ({error.strerror})")

    def _inspect(self, candidate: Candidate, before: str, starter: InstalledStarter | None) -> None:
        path = candidate.path
        key = str(path)
        # Of what changes while the file is inspected the next scan shall know.
        self.notes.around.listing(path.parent)
        outcome = self.identify_file(path)
        if file_signature(path) != before:
            # It is being written: keep the known record until the next scan.
            self.seen.add(key)
            self.notes.note_arriving(path, file_signature(path), Arrivals.reason(path))
            return
        match outcome:
            case ModelInfo() as info:
                links = [file for file in info.files if self.walked.leads_outside(file)]
                if links and starter is None:
                    reason = _LINK_OUT.format(links[0].name)
                    self._add_refused(_Refusal(candidate, Refused(info.format, reason), before))
                else:
                    self._add_model(info, candidate, starter)
            case Refused() as refused:
                self._add_refused(_Refusal(candidate, refused, before, starter))
            case Unknown():
                self.notes.note_unknown(path, before)
            case Uninspected(reason):
                self.notes.note_failure(path, before, reason)
                self.seen.add(key)
                log_skipped(f"{path}: {reason}; it will be tried again")
            case _:
                assert_never(outcome)

    def _add_refused(self, refusal: _Refusal) -> None:
        package = self._packages.of(refusal.candidate.path, refusal.candidate.root)
        self._refusals.setdefault(package, []).append(refusal)

    def _is_claimed(self, path: Path) -> bool:
        """Whether the file belongs to a model already; cached models may share their blobs."""
        if str(path) in self.claimed:
            return True
        return "snapshots" not in path.parts and os.path.realpath(path) in self.claimed

    def _is_still_arriving(self, candidate: Candidate, before: str) -> bool:
        """Whether a file that was arriving at the last scan still is; if so note it again."""
        path = candidate.path
        if self.notes.arriving(path) is None:
            return False
        package = self._packages.of(path, candidate.root)
        reason = self._arrivals().sign(path, package)
        if reason:
            self.notes.note_arriving(path, before, reason)
        return bool(reason)

    def _arrivals(self) -> Arrivals:
        return Arrivals(self.notes.around, self.walked.partial, self.notes.now)

    def _note_unread(self, path: Path, reason: str) -> None:
        """Note that a file, or what belongs to it, cannot be read for now."""
        try:
            self.notes.note_failure(path, file_signature(path), reason)
        except OSError:
            self.notes.keep(str(path))

    def keep_unread(self) -> None:
        """Leave the records of files alone that exist and cannot be read for now."""
        for key in self.known:
            is_unread = self.walked.unread and self.walked.is_unread(Path(key))
            if key not in self.seen and is_unread:
                self.seen.add(key)
                self.notes.keep(key)

    def _refuse_unopened(self, candidate: Candidate) -> None:
        """Refuse what is not opened at all, such as a link out of the folders."""
        path = candidate.path
        format = natural_format(path) or ("gguf" if candidate.names else "")
        if not format:
            return
        reason = candidate.refusal
        if path.is_symlink():
            reason = (
                f"{path.name} is {reason}; put the file itself here, or add its folder to "
                "IMPETUS_MODELS_PATH."
            )
        self._add_refused(_Refusal(candidate, Refused(format, reason), ""))

    def _add_model(
        self, info: ModelInfo, candidate: Candidate, starter: InstalledStarter | None
    ) -> None:
        if candidate.names:
            info = _named(info, candidate.names)
        else:
            info = replace(info, name=bare_name(info.files[0].parts, info.name))
        info = _with_content(_with_facts(info, candidate))
        source: Source = starter.package if starter else Local(str(candidate.root))
        source = _converted(info, source)
        if starter is not None:
            info = starter.describe(info)
        if record_key(info) in self.seen:
            return
        self.found.append(ScannedModel(info, source, self._fingerprint(info, None)))
        self._claim(info, candidate, is_refused=False)

    def add_refusals(self) -> None:
        """Add one entry for each package whose files were refused; call it after all files."""
        for package, refusals in self._refusals.items():
            try:
                self._add_refusal(package, sorted(refusals, key=lambda one: one.importance))
            except OSError as error:
                log_skipped(f"{package}: cannot be read ({error.strerror})")
                self.seen.update(str(one.candidate.path) for one in refusals)

    def _add_refusal(self, package: Path, refusals: list[_Refusal]) -> None:
        is_served = package in self._served
        told: set[str] = set()
        for one in refusals:
            path = one.candidate.path
            format = one.refused.format if is_served else ""
            is_extra = is_served and (one.refused.is_guess or is_part(path))
            # Such as the weights of a Dense module, which may be looked at before their model.
            is_extra = is_extra or self._is_claimed(path)
            if is_extra or package in self._refused or format in told:
                self._note_part(one)
                continue
            told.add(format)
            is_certain = one.candidate.refusal or self._was_truncated(path)
            reason = "" if is_certain else self._arrivals().sign(path, package)
            if reason:
                self.notes.note_arriving(path, one.before, reason)
                self.seen.add(str(path))
            else:
                self._refuse(one, package)

    def _was_truncated(self, path: Path) -> bool:
        """Whether the file of a model that was served is shorter now: nobody is adding to it."""
        record = self.known.get(str(path))
        if record is None or record.state != "ok" or not record.signatures:
            return False
        return _size(path) < size_of(record.signatures[0])

    def _note_part(self, refusal: _Refusal) -> None:
        """Note a file that another file of its package already stands for."""
        path = refusal.candidate.path
        if refusal.before:
            self.notes.note_unknown(path, refusal.before)
        self.claimed.add(str(path))

    def _refuse(self, refusal: _Refusal, package: Path) -> None:
        candidate, refused = refusal.candidate, refusal.refused
        path = candidate.path
        parts = package.parts if package.is_dir() else path.parts
        name = bare_name([f"{candidate.names[0]}.gguf"] if candidate.names else parts, "")
        info = unread_info(refused.format, name, path, _size(path))
        source: Source = Local(str(candidate.root))
        if refusal.starter is not None:
            info, source = refusal.starter.describe(info), refusal.starter.package
        fingerprint = self._fingerprint(info, package)
        self.found.append(ScannedModel(info, source, fingerprint, refused.reason))
        self._claim(info, candidate, is_refused=True)

    def add_built_in(self, info: ModelInfo) -> None:
        """Add a model without files to the scan."""
        key = record_key(info)
        record = self.known.get(key)
        self.seen.add(key)
        if record is None or record.info != info or record.state != "ok":
            self.found.append(ScannedModel(info, BuiltIn(), f"{READER_VERSION}:"))

    def _claim(self, info: ModelInfo, candidate: Candidate, *, is_refused: bool) -> None:
        self.seen.add(record_key(info))
        self._first_files.add(os.path.realpath(info.files[0]))
        for file in info.files:
            self.claimed.update((str(file), os.path.realpath(file)))
        package = self._packages.of(info.files[0], candidate.root)
        (self._refused if is_refused else self._served).add(package)

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
        if not os.path.isabs(key):
            return False
        if key in self.claimed:
            return True
        target = os.path.realpath(key)
        # Another name of a model's first file is the model itself, under a new name.
        return target in self.claimed and target not in self._first_files

    def _fingerprint(self, info: ModelInfo, package: Path | None) -> str:
        """Return a text that changes when the model's files, or what is around them, change.

        `package` is that of a refused model.
        """
        around = self.notes.around.digest(info.files, info.format, package)
        # A format that is switched on later may recognize what is refused now.
        formats = self.notes.formats if package is not None else ""
        signatures = ",".join(model_signature(info.files))
        return f"{READER_VERSION}:{signatures}|{around}|{formats}"

    def _is_current(
        self, record: ModelRecord, candidate: Candidate, starter: InstalledStarter | None
    ) -> bool:
        """Whether the record still matches its files, so that they need not be read."""
        if record.state == "missing":
            return False
        if starter is not None and starter.describe(record.info) != record.info:
            return False
        known_facts = record.info.details.get(STORE_FACTS, "")
        if record.state == "ok" and known_facts != candidate.facts_digest:
            return False
        package = None
        if record.state == "refused":
            package = self._packages.of(candidate.path, candidate.root)
        try:
            return self._fingerprint(record.info, package) == record.fingerprint
        except OSError:
            return False


def _named(info: ModelInfo, names: Sequence[str]) -> ModelInfo:
    """Return `info` with the first name; it can be asked for by the others as well."""
    bare = list(dict.fromkeys(bare_name([f"{name}.gguf"], info.name) for name in names))
    details = {**info.details, OTHER_NAMES: ",".join(bare[1:])} if bare[1:] else info.details
    return replace(info, name=bare[0], details=details)


def _with_facts(info: ModelInfo, candidate: Candidate) -> ModelInfo:
    """Return `info` with what the store of another program says.

    A licence and a chat template of the model's own stay.
    """
    if not candidate.facts:
        return info
    facts = dict(candidate.facts)
    license, template = str(facts.pop(LICENSE, "")), str(facts.pop(CHAT_TEMPLATE, ""))
    if template and info.chat_template is None and Capability.CHAT in info.capabilities:
        capabilities = info.capabilities | template_capabilities((template,))
        info = replace(info, chat_template=template, capabilities=capabilities)
    details = {**info.details, **facts, STORE_FACTS: candidate.facts_digest}
    return replace(info, license=info.license or license, details=details)


def _with_content(info: ModelInfo) -> ModelInfo:
    """Return `info` with a digest of its files, by which copies are told."""
    try:
        digest = content_digest(info.files)
    except OSError:
        return info
    return replace(info, details={**info.details, CONTENT: digest})


def _converted(info: ModelInfo, source: Source) -> Source:
    """Return `Converted` if a provenance.json says so, else `source`."""
    if not isinstance(source, Local):
        return source
    found = provenance_of(info.files[0], Path(source.root))
    if found is None:
        return source
    return Converted(source.root, found.model_id, found.choices, found.quality)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@lru_cache(maxsize=1024)
def log_skipped(line: str) -> None:
    """Log a skipped path once per process, not in every scan."""
    logger.warning("skipped %s", line)
