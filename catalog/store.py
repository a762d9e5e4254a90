"""Stores models, aliases and settings in SQLite, and what scans note of files."""

import json
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backends.base import ModelInfo
from catalog.changes import describe_changes
from catalog.database_errors import cause, failure, is_damage
from catalog.encoding import info_from_json, info_to_json, source_from_json, source_to_json
from catalog.inspections import Inspection, read_inspections, write_inspections
from catalog.migrations import back_up, backup_path, open_catalog
from catalog.models import (
    OTHER_NAMES,
    ModelRecord,
    ModelSettings,
    RecordState,
    ScannedModel,
    ScanReport,
    record_key,
    revised_path,
    signatures_of,
)
from catalog.names import model_id, tag_name, unique_id
from core.errors import ImpetusError, ModelNotFound, NotFound, RequestError

logger = logging.getLogger(__name__)

_LONGEST_NAME = 200
_MOST_ALIASES = 1000
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}")
_STATES: dict[str, RecordState] = {
    "ok": "ok", "refused": "refused", "missing": "missing", "uninspected": "uninspected",
}  # fmt: skip
_RECORDS = """
    SELECT models.id, info, source, fingerprint, added_at,
           CASE WHEN failed.path IS NULL THEN state ELSE 'uninspected' END,
           CASE WHEN failed.path IS NULL THEN models.reason ELSE failed.reason END,
           settings,
           (SELECT json_group_array(alias) FROM aliases WHERE model_id = models.id)
    FROM models
    LEFT JOIN inspections AS failed
         ON failed.path = models.key AND failed.verdict = 'uninspected' AND state != 'missing'
"""
_OTHER_NAMES = f"""
    WHERE instr(',' || json_extract(info, '$.details.{OTHER_NAMES}') || ',', ?) ORDER BY models.id
"""
# How often a file that was damaged or replaced is opened again.
_REOPEN_S = 5.0
# Sorts after every character of an id.
_AFTER_ALL = "~"
_Row = tuple[str, str, str, str, float, str, str, str, str]


class CatalogStore:
    """The catalog database.  Every call blocks briefly; thread-safe.

    Several processes may open the same file; writers wait up to 5 s for each other.  A damaged
    file is moved aside and replaced by an empty catalog, and one that was deleted is made anew,
    also while it is open.  Raises ImpetusError when the file cannot be opened or has a newer
    schema, CatalogNotWritten when it cannot be written for now.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._is_closed = False
        self._next_reopen_at = 0.0
        self._backed_up: int | None = None
        try:
            self._connection = open_catalog(path)
        except (OSError, sqlite3.Error) as error:
            raise ImpetusError(
                f"The catalog {path} cannot be opened: {cause(error)}. Check that its folder "
                "exists and that you may write to it."
            ) from error
        self._identity = _identity(path)

    def close(self) -> None:
        """Close the database; may be called twice."""
        with self._lock:
            self._is_closed = True
            self._connection.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if _identity(self._path) != self._identity:
                self._reopen("its file was deleted or replaced")
            try:
                yield self._connection
            except sqlite3.Error as error:
                if is_damage(error):
                    self._reopen(cause(error))
                raise failure(self._path, error) from error

    def _reopen(self, reason: str) -> None:
        """Open the file at the path anew, at most every 5 s; a damaged one is moved aside."""
        if self._is_closed or time.monotonic() < self._next_reopen_at:
            return
        self._next_reopen_at = time.monotonic() + _REOPEN_S
        try:
            connection = open_catalog(self._path)
        except (ImpetusError, OSError, sqlite3.Error) as error:
            # What is open may still be read.
            logger.error("the catalog cannot be opened again (%s): %s", reason, cause(error))
            return
        logger.warning("the catalog was opened again: %s", reason)
        with suppress(sqlite3.Error):
            self._connection.close()
        self._connection = connection
        self._identity = _identity(self._path)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Run the body as one transaction that also increments the change counter."""
        with self._reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("UPDATE changes SET count = count + 1")
                connection.execute("COMMIT")
            finally:
                self._roll_back(connection)

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        """End a transaction that was not committed; a connection that cannot is replaced."""
        if not connection.in_transaction:
            return
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        if connection.in_transaction:
            self._reopen("a transaction could not be rolled back")

    def data_version(self) -> int:
        """Return the change counter, which every write by any process increments; cheap."""
        with self._reading() as connection:
            return int(connection.execute("SELECT count FROM changes").fetchone()[0])

    def back_up(self) -> None:
        """Copy the catalog to its backup if it changed since the last copy; blocks meanwhile.

        Raises OSError and sqlite3.Error.
        """
        version = self.data_version()
        if version != self._backed_up:
            back_up(self._path, backup_path(self._path))
            self._backed_up = version

    def models(self, known: "KnownRecords | None" = None) -> list[ModelRecord]:
        """Return all models ordered by id, including refused and missing ones.

        Damaged rows are left out; the next scan writes them again.  `known` are those of an earlier
        call: where a row is the same its record is the same object.  It is updated.
        """
        with self._reading() as connection:
            rows = connection.execute(_RECORDS + " ORDER BY models.id").fetchall()
        return _records(rows) if known is None else known.records(rows)

    def get(self, model_id: str) -> ModelRecord | None:
        """Return the model with exactly this id."""
        if not _is_valid_name(model_id):
            return None
        with self._reading() as connection:
            rows = connection.execute(_RECORDS + " WHERE models.id = ?", (model_id,)).fetchall()
        return next(iter(_records(rows)), None)

    def resolve(self, name: str) -> list[ModelRecord]:
        """Return the models that `name` can refer to, ignoring case; empty for an unknown name.

        (1) An id is that model.  (2) Next comes a user's alias.  (3) A bare name is all
        variants of the model.  (4) An Ollama tag, such as `llama3.2:1b`, is the bare name made of
        it, or (5) another bare name of a model.
        """
        if not _is_valid_name(name):
            return []
        wanted = name.lower()
        tag = tag_name(wanted) if ":" in wanted else wanted
        # Most names are no tags: (3) and (4) are then one question.
        conditions = (
            (" WHERE models.id = ?", wanted),  # (1)
            (" WHERE models.id = (SELECT model_id FROM aliases WHERE alias = ?)", wanted),  # (2)
            (" WHERE name = ? ORDER BY models.id", wanted),  # (3)
            (" WHERE name = ? ORDER BY models.id", tag),  # (4)
            (_OTHER_NAMES, f",{tag},"),  # (5)
        )
        for condition, value in dict.fromkeys(conditions):
            with self._reading() as connection:
                rows = connection.execute(_RECORDS + condition, (value,)).fetchall()
            if rows:
                return _records(rows)
        return []

    def inspections(self) -> dict[str, Inspection]:
        """Return the files that are no models or could not be inspected yet, by path."""
        with self._reading() as connection:
            return read_inspections(connection)

    def uninspected(self) -> Sequence[Inspection]:
        """Return the files that could not be inspected yet."""
        with self._reading() as connection:
            return tuple(read_inspections(connection, ("uninspected",)).values())

    def aliases(self) -> dict[str, str]:
        """Return every alias with its model's id."""
        with self._reading() as connection:
            rows = connection.execute("SELECT alias, model_id FROM aliases ORDER BY alias")
            return dict(rows.fetchall())

    def set_alias(self, alias: str, model_id: str) -> None:
        """Point `alias` to a model, replacing an earlier target.

        Raises RequestError for a malformed alias and for more than 1,000, ModelNotFound.  An alias
        cannot equal an id, because every id contains an @.
        """
        if _ALIAS.fullmatch(alias) is None:
            raise RequestError(
                "An alias has 1 to 100 characters: letters, digits, dots, underscores, colons, "
                "slashes and hyphens, starting with a letter or digit.",
                param="alias",
            )
        if not _is_valid_name(model_id):
            raise ModelNotFound.of(model_id, [])
        with self._writing() as connection:
            known = connection.execute("SELECT 1 FROM models WHERE id = ?", (model_id,))
            if known.fetchone() is None:
                raise ModelNotFound.of(model_id, [])
            connection.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?)", (alias, model_id))
            count = connection.execute("SELECT count(*) FROM aliases").fetchone()[0]
            if count > _MOST_ALIASES:
                raise RequestError(
                    f"There are {_MOST_ALIASES:,} aliases, the most that are possible; delete one "
                    "first.",
                    param="alias",
                )

    def remove_alias(self, alias: str) -> None:
        """Delete an alias.  Raises NotFound."""
        unknown = NotFound(f"There is no alias {alias[:100]!r}.", param="alias")
        if not _is_valid_name(alias):
            raise unknown
        with self._writing() as connection:
            if not connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,)).rowcount:
                raise unknown

    def change_settings(self, model_id: str, changes: Mapping[str, Any]) -> ModelSettings:
        """Set the fields of `ModelSettings` named in `changes`; None restores the default.

        Returns all settings.  Raises ModelNotFound, and TypeError for an unknown field.
        """
        if not _is_valid_name(model_id):
            raise ModelNotFound.of(model_id, [])
        with self._writing() as connection:
            row = connection.execute("SELECT settings FROM models WHERE id = ?", (model_id,))
            known = row.fetchone()
            if known is None:
                raise ModelNotFound.of(model_id, [])
            settings = replace(_settings(known[0]), **changes)
            values = {name: value for name, value in asdict(settings).items() if value is not None}
            connection.execute(
                "UPDATE models SET settings = ? WHERE id = ?", (json.dumps(values), model_id)
            )
        return settings

    def adopt(self, model_id: str, found_id: str) -> None:
        """Give the missing model `model_id` the files of `found_id`, whose own entry ends.

        It keeps its id, its aliases and, if it has any, its settings; the other's aliases become
        its own.  Raises ModelNotFound.
        """
        if not (_is_valid_name(model_id) and _is_valid_name(found_id)):
            raise ModelNotFound.of(model_id, [])
        with self._writing() as connection:
            connection.execute(
                "UPDATE aliases SET model_id = ? WHERE model_id = ?", (model_id, found_id)
            )
            found = connection.execute(
                "DELETE FROM models WHERE id = ? AND state = 'ok' RETURNING key, base_id, name,"
                " state, reason, fingerprint, source, info, settings",
                (found_id,),
            ).fetchone()
            changed = found and connection.execute(
                "UPDATE models SET key = ?, base_id = ?, name = ?, state = ?, reason = ?,"
                " fingerprint = ?, source = ?, info = ?,"
                " settings = CASE settings WHEN '{}' THEN ? ELSE settings END"
                " WHERE id = ? AND state = 'missing'",
                (*found, model_id),
            )
            if not changed or not changed.rowcount:
                raise ModelNotFound.of(model_id, [])

    def record_scan(
        self,
        found: Sequence[ScannedModel],
        missing: Sequence[str],
        forgotten: Sequence[str],
        *,
        now: float,
        inspections: Sequence[Inspection] = (),
        inspected: Sequence[str] = (),
    ) -> ScanReport:
        """Write the result of a scan in one transaction; does nothing if there are no changes.

        `missing` are keys whose files no longer exist, `forgotten` keys of files that are now
        part of another model.  A model keeps its id, also when its files move.  `inspections` are
        new notes on files, `inspected` the paths whose notes no longer hold.
        """
        if not (found or missing or forgotten or inspections or inspected):
            return ScanReport()
        lists: dict[str, list[str]] = {"added": [], "changed": [], "refused": [], "missing": []}
        with self._writing() as connection:
            write_inspections(connection, inspections, inspected)
            for key in forgotten:
                connection.execute("DELETE FROM models WHERE key = ?", (key,))
            for key in missing:
                row = connection.execute(
                    "UPDATE models SET state = 'missing', reason = 'its files no longer exist' "
                    "WHERE key = ? RETURNING id",
                    (key,),
                ).fetchone()
                lists["missing"] += row or ()
            for item in found:
                kind, written_id = _write(connection, item, now)
                lists[kind].append(written_id)
        ids = {kind: tuple(sorted(found_ids)) for kind, found_ids in lists.items()}
        return ScanReport(ids["added"], ids["changed"], ids["refused"], ids["missing"])


def _is_valid_name(name: str) -> bool:
    """Whether `name` can be an id or alias; excludes text that SQLite cannot encode."""
    return 0 < len(name) <= _LONGEST_NAME and name.isascii()


def _write(connection: sqlite3.Connection, item: ScannedModel, now: float) -> tuple[str, str]:
    """Insert or update one model; return the report's list it belongs to, and its id."""
    info, reason = item.info, item.reason
    key, base = record_key(info), model_id(info.name, info.format, info.quantization)
    row = connection.execute("SELECT id, base_id FROM models WHERE key = ?", (key,)).fetchone()
    if row is None or (item.state == "ok" and _was_refused(connection, row[0])):
        moved = _moved_from(connection, item, base)
        if row is not None and moved is not None:
            # While it was incomplete it was refused under an id of its own.
            connection.execute("DELETE FROM models WHERE key = ?", (key,))
        row = moved or row
    is_new = row is None
    old_id, old_base = row or (None, None)
    if item.state == "refused" and old_id is not None and not _was_refused(connection, old_id):
        # Nothing is known of a damaged file: who asks for the model gets the reason.
        base = str(old_base)
        info, reason = _damaged(connection, item, old_id)
    new_id = old_id
    if old_id is None or old_base != base:
        # Only ids that begin with it can equal it, or be numbered after it.
        taken = connection.execute(
            "SELECT id FROM models WHERE id >= ? AND id < ? AND id IS NOT ?",
            (base, base + _AFTER_ALL, old_id),
        )
        new_id = unique_id(base, {taken_id for (taken_id,) in taken})
    values = (
        key, new_id, base, info.name, item.state, reason, item.fingerprint,
        source_to_json(item.source), info_to_json(info),
    )  # fmt: skip
    if is_new:
        connection.execute(
            "INSERT INTO models (key, id, base_id, name, state, reason, fingerprint, source, info,"
            " added_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, now),
        )
    else:
        connection.execute(
            "UPDATE models SET key = ?, id = ?, base_id = ?, name = ?, state = ?, reason = ?,"
            " fingerprint = ?, source = ?, info = ? WHERE id = ?",
            (*values, old_id),
        )
    kind = "refused" if item.state == "refused" else "added" if is_new else "changed"
    return kind, str(new_id)


def _was_refused(connection: sqlite3.Connection, old_id: str) -> bool:
    """Whether nothing was ever known of a model but why it is refused."""
    (info,) = connection.execute("SELECT info FROM models WHERE id = ?", (old_id,)).fetchone()
    with suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        known = info_from_json(info)
        return not (known.architecture or known.quantization or known.parameters)
    return True


def _damaged(
    connection: sqlite3.Connection, item: ScannedModel, old_id: str
) -> tuple[ModelInfo, str]:
    """Return the info and reason of a known model that is refused now: named as it was."""
    name, fingerprint, info = connection.execute(
        "SELECT name, fingerprint, info FROM models WHERE id = ?", (old_id,)
    ).fetchone()
    change = ""
    # A damaged row must not stop the scan that mends it.
    with suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        change = describe_changes(info_from_json(info).files, signatures_of(fingerprint))
    return replace(item.info, name=name), f"{change}; {item.reason}" if change else item.reason


def _moved_from(
    connection: sqlite3.Connection, item: ScannedModel, base: str
) -> tuple[str, str] | None:
    """Return id and base id of the missing model that `item` was before.

    It differs only in its path, or is an earlier revision in the same cached repository.
    """
    if place := revised_path(record_key(item.info)):
        for old_key, old_id, old_base in connection.execute(
            "SELECT key, id, base_id FROM models"
            " WHERE state = 'missing' AND key LIKE '%/snapshots/%'"
        ):
            if revised_path(old_key) == place:
                return old_id, old_base
    rows = connection.execute(
        "SELECT id, base_id, info FROM models WHERE name = ? AND base_id = ? AND state = 'missing'"
        " ORDER BY id",
        (item.info.name, base),
    )
    wanted = json.loads(info_to_json(item.info)) | {"files": None}
    for old_id, old_base, info in rows.fetchall():
        with suppress(ValueError, TypeError):
            if json.loads(info) | {"files": None} == wanted:
                return old_id, old_base
    return None


class KnownRecords:
    """The records of an earlier call of `CatalogStore.models`, by what their rows hold."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, ModelRecord]] = {}

    def records(self, rows: Sequence[_Row]) -> list[ModelRecord]:
        """Return the records of rows; only those of new and changed rows are made."""
        kept: dict[str, tuple[int, ModelRecord]] = {}
        for row in rows:
            digest = hash(row)
            known = self._known.get(row[0])
            if known is not None and known[0] == digest:
                kept[row[0]] = known
            else:
                kept.update((row[0], (digest, record)) for record in _records([row]))
        self._known = kept
        return [record for _, record in kept.values()]


def _records(rows: Sequence[_Row]) -> list[ModelRecord]:
    found = []
    for row in rows:
        try:
            found.append(_record(row))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            logger.warning("the catalog's entry of %.200r is damaged: %r", row[0], problem)
    return found


def _record(row: _Row) -> ModelRecord:
    model_id, info, source, fingerprint, added_at, state, reason, settings, aliases = row
    return ModelRecord(
        id=model_id,
        info=info_from_json(info),
        source=source_from_json(source),
        fingerprint=fingerprint,
        added_at=added_at,
        aliases=tuple(sorted(json.loads(aliases))),
        state=_STATES[state],
        reason=reason,
        settings=_settings(settings),
    )


def _settings(text: str) -> ModelSettings:
    """Return the settings of a row; damaged ones are as if they had not been set."""
    try:
        return ModelSettings(**json.loads(text))
    except (TypeError, ValueError) as problem:
        logger.warning("damaged settings of a model are not used: %r", problem)
        return ModelSettings()


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the file's device and inode; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
