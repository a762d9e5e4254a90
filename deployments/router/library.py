"""Keeps all models of the catalog as the API shows them, made anew where the catalog changed."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from catalog.models import CONTENT, BuiltIn, Converted, Local, ModelRecord, Package, Source
from catalog.scan.unlisted import unlisted_records
from catalog.store import CatalogStore, KnownRecords
from deployments.router.management import settings_view
from router.services import LibraryEntry, ModelView


@dataclass(frozen=True, slots=True)
class KnownLibrary:
    """All models by id at one state of the catalog: their records, and how they are shown."""

    version: int
    records: Mapping[str, ModelRecord]
    entries: Sequence[LibraryEntry]


class LibraryCache:
    """The models of a catalog; for several threads.

    `show` makes a model's view while nothing is loaded, `owners` are those of the model folders.
    """

    def __init__(
        self,
        store: CatalogStore,
        show: Callable[[ModelRecord], ModelView],
        owners: Callable[[], Mapping[str, str]],
    ) -> None:
        self._store = store
        self._show = show
        self._owners = owners
        self._lock = threading.Lock()
        self._known = KnownRecords()
        self._made: dict[str, tuple[ModelRecord, LibraryEntry]] = {}
        self._library = KnownLibrary(-1, {}, ())

    def current(self) -> KnownLibrary:
        """Return the library as the catalog is now; blocks, for about 0.2 ms a model that changed.

        The same object until the catalog changes.  Raises what CatalogStore does.
        """
        with self._lock:
            version = self._store.data_version()
            if version != self._library.version:
                self._library = self._read(version)
            return self._library

    def _read(self, version: int) -> KnownLibrary:
        records = self._store.models(self._known)
        records += unlisted_records(self._store.uninspected(), records)
        owners = self._owners()
        copies = duplicates(records)
        made: dict[str, tuple[ModelRecord, LibraryEntry]] = {}
        for record in records:
            known = self._made.get(record.id)
            entry = known[1] if known is not None and known[0] is record else self._entry(record)
            facts = copies.get(record.id, ()), source_name(record.source, owners)
            if facts != (entry.view.duplicates, entry.view.source):
                view = replace(entry.view, duplicates=facts[0], source=facts[1])
                entry = replace(entry, view=view)
            made[record.id] = record, entry
        self._made = made
        return KnownLibrary(
            version,
            {record.id: record for record in records},
            [made[model_id][1] for model_id in sorted(made)],
        )

    def _entry(self, record: ModelRecord) -> LibraryEntry:
        return LibraryEntry(self._show(record), settings_view(record.settings))


def source_name(source: Source, owners: Mapping[str, str]) -> str:
    """Return where a model's files are from; see `ModelView.source`."""
    match source:
        case Local(root):
            return owners.get(os.path.normpath(root), "folder")
        case Converted():
            return "converted"
        case Package():
            return "package"
        case BuiltIn():
            return "built-in"


def duplicates(records: Sequence[ModelRecord]) -> dict[str, tuple[str, ...]]:
    """Return, for each model with copies, the ids of those."""
    by_content: dict[object, list[str]] = {}
    for record in records:
        content = record.info.details.get(CONTENT)
        if content and record.state == "ok":
            by_content.setdefault(content, []).append(record.id)
    return {
        model_id: tuple(other for other in ids if other != model_id)
        for ids in by_content.values()
        if len(ids) > 1
        for model_id in ids
    }
