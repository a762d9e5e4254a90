"""Scans model folders, starters and built-in models, and updates the catalog."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from backends.base import Backend
from catalog.last_scan import LastScan
from catalog.models import ScanReport
from catalog.scan.arrivals import PROMISED_LOOK_S, Arrivals
from catalog.scan.identify import HasBuiltInModels, Outcome, examine
from catalog.scan.notes import InspectionNotes
from catalog.scan.places import model_folders
from catalog.scan.run import ScanRun, log_skipped
from catalog.scan.starters import STARTERS, InstalledStarter, installed_starter
from catalog.scan.walk import Candidate, walk
from catalog.store import CatalogStore
from core.settings import Settings


def scan(
    settings: Settings,
    store: CatalogStore,
    backends: Sequence[Backend],
    *,
    identify_file: Callable[[Path], Outcome] | None = None,
    clock: Callable[[], float] = time.time,
    urgent: Collection[str] = (),
    last: LastScan | None = None,
) -> ScanReport:
    """Scan every model folder and store the changes; blocks, for seconds on a large disk.

    `identify_file` identifies a file; by default the backends do so in this process.

    Unchanged files are not opened, whether they are models or not.  Models that cannot be used
    stay in the catalog, each once, with the reason, and are read again when they or their folder
    change; deleted ones stay as missing.  A model that cannot be used while its files are being
    written is arriving: it is read when they are quiet; so is one of which only an unfinished
    download is there.  A file whose inspection failed is inspected again after a minute, later
    after up to an hour, and at once if its path is among `urgent`.

    `last` is the former scan of this process with the same formats: if nothing has changed since,
    the files are only listed.
    """
    roots = model_folders(settings)
    if last is not None and (report := last.report(roots, store.data_version())) is not None:
        return report
    identify_file = identify_file or (lambda path: examine(path, backends))
    notes = InspectionNotes(store.inspections(), backends, clock(), urgent)
    found = walk(roots)
    starters = list(_starters(settings))
    if last is not None:
        last.begin(found.folders, [installed.path for installed in starters])
    known = {record.key: record for record in store.models()}
    run = ScanRun(known, notes, identify_file, found)
    for candidate in found.candidates:
        run.add_file(candidate)
    for installed in starters:
        run.add_file(Candidate(installed.path, installed.path.parent), installed)
    run.add_refusals()
    _note_promised(run)
    for backend in backends:
        if isinstance(backend, HasBuiltInModels):
            for info in backend.built_in():
                run.add_built_in(info)
    for line in found.skipped:
        log_skipped(line)
    run.keep_unread()
    report = store.record_scan(
        run.found,
        run.missing(),
        run.forgotten(),
        now=clock(),
        inspections=notes.changed(),
        inspected=notes.outdated(),
    )
    report = replace(
        report,
        skipped=tuple(found.skipped),
        next_look_s=notes.next_look_s(),
        folders=found.folders,
        has_unread=notes.has_unread or bool(found.unread),
    )
    if last is not None:
        last.end(roots, store.data_version(), report)
    return report


def _note_promised(run: ScanRun) -> None:
    """Note the models of which only unfinished downloads are there."""
    notes = run.notes
    arrivals = Arrivals(notes.around, run.walked.partial, notes.now)
    for path, reason in arrivals.promised({*run.known, *run.seen}):
        with suppress(OSError):
            notes.note_arriving(path, "", reason, PROMISED_LOOK_S)


def _starters(settings: Settings) -> Iterator[InstalledStarter]:
    for starter in STARTERS if settings.starters else ():
        installed = installed_starter(starter)
        if installed is not None:
            yield installed
