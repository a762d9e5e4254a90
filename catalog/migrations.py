"""Opens the catalog database, migrates its schema, backs it up, and replaces a damaged file."""

import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from catalog.connection import connect
from catalog.database_errors import damage, is_damage
from core.errors import ImpetusError
from core.files import lock_file

logger = logging.getLogger(__name__)

Migration: TypeAlias = Callable[[sqlite3.Connection], None]

# How long to wait for another process that opens the catalog at the same time.
_OPENING_S = 10.0
_MAX_ASIDE = 5
_SCHEMA = (
    "SELECT key, id, base_id, name, state, reason, fingerprint, added_at, source, info, settings "
    "FROM models LIMIT 0",
    "SELECT alias, model_id FROM aliases LIMIT 0",
)


def move_aside(path: Path) -> Path:
    """Rename a damaged database and its journals to the next free `.corrupt-<n>`; return it.

    At most 5 are kept: the last one is replaced.
    """
    number = 1
    while number < _MAX_ASIDE and path.with_name(f"{path.name}.corrupt-{number}").exists():
        number += 1
    aside = path.with_name(f"{path.name}.corrupt-{number}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.replace(aside.with_name(aside.name + suffix))
    return aside


def m001_models(connection: sqlite3.Connection) -> None:
    """Create the tables for models and aliases, and the change counter."""
    connection.execute(
        """
        CREATE TABLE models (
            key TEXT PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            base_id TEXT NOT NULL,
            name TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('ok', 'refused', 'missing')),
            reason TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            added_at REAL NOT NULL,
            source TEXT NOT NULL,
            info TEXT NOT NULL
        ) STRICT
        """
    )
    connection.execute("CREATE INDEX models_by_name ON models (name)")
    connection.execute(
        """
        CREATE TABLE aliases (
            alias TEXT PRIMARY KEY COLLATE NOCASE,
            model_id TEXT NOT NULL REFERENCES models (id) ON UPDATE CASCADE ON DELETE CASCADE
        ) STRICT
        """
    )
    connection.execute("CREATE INDEX aliases_by_model ON aliases (model_id)")
    connection.execute("CREATE TABLE changes (only_row INTEGER PRIMARY KEY, count INTEGER) STRICT")
    # A random start, so that readers with a cache notice a rebuilt catalog.
    connection.execute("INSERT INTO changes VALUES (1, abs(random() % 1000000000))")


def m002_settings(connection: sqlite3.Connection) -> None:
    """Add a column for each model's settings: a JSON object of those that were set."""
    connection.execute("ALTER TABLE models ADD COLUMN settings TEXT NOT NULL DEFAULT '{}'")


def m003_inspections(connection: sqlite3.Connection) -> None:
    """Create the table of files that are no models or could not be inspected yet."""
    connection.execute(
        """
        CREATE TABLE IF NOT EXISTS inspections (
            path TEXT PRIMARY KEY,
            signature TEXT NOT NULL,
            verdict TEXT NOT NULL CHECK (verdict IN ('unknown', 'uninspected')),
            reason TEXT NOT NULL,
            attempts INTEGER NOT NULL,
            retry_at REAL NOT NULL
        ) STRICT
        """
    )


MIGRATIONS: tuple[Migration, ...] = (m001_models, m002_settings, m003_inspections)


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Run the migrations that the database lacks, each in its own transaction.

    `connection` is in autocommit mode.  Raises ImpetusError for a schema newer than this program,
    which is left untouched, and for a failing migration, which is rolled back.
    """
    version = _version(connection)
    if version > len(migrations):
        raise ImpetusError(
            f"The catalog was written by a newer version of Impetus (its schema is {version}, this "
            f"version supports up to {len(migrations)}). Install the newer version, or set "
            "IMPETUS_HOME to another folder."
        )
    for number, step in enumerate(migrations[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            step(connection)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            raise ImpetusError(
                f"Migrating the catalog to schema {number} failed and was rolled back: {error}. "
                "Check that the disk has free space, then start the server again."
            ) from error


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def open_catalog(path: Path) -> sqlite3.Connection:
    """Return the catalog at `path` with the current schema, in autocommit mode.

    A damaged file is moved aside and replaced by its last backup, or by an empty catalog.  One with
    an older schema is copied before it is migrated.  Raises OSError, sqlite3.Error, and the errors
    of `migrate`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(path.with_name(path.name + ".lock")):
        return _open(path)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that keeps other processes from opening or migrating the catalog.

    Raises OSError, also when another process holds it for more than 10 s.
    """
    with path.open("a") as file:
        lock_file(file, _OPENING_S)
        yield


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        aside = move_aside(path)
        restored = _restore(path)
        if restored is not None:
            logger.error(
                "the catalog is damaged (%s); it was moved to %s. Its last backup is used, and "
                "filled from the model folders; aliases and settings that were made in the last "
                "minutes may have to be set again.",
                error,
                aside,
            )
            return restored
        logger.error(
            "the catalog is damaged (%s); it was moved to %s. A new one is filled from the model "
            "folders; aliases and settings of models have to be set again.",
            error,
            aside,
        )
        return _connect(path)


def backup_path(path: Path) -> Path:
    """Return where the backup of the catalog at `path` lies."""
    return path.with_name(f"{path.name}.backup")


def back_up(path: Path, target: Path) -> None:
    """Copy the open catalog at `path` to `target`, which is whole at any time.

    Blocks while the file is copied; others can write meanwhile.  Raises OSError and sqlite3.Error.
    """
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(part)) as copy,
        ):
            source.backup(copy)
            _check_pages(copy)
        part.replace(target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _restore(path: Path) -> sqlite3.Connection | None:
    """Open the backup in place of the catalog; None if there is none that can be used."""
    backup = backup_path(path)
    if not backup.exists():
        return None
    try:
        shutil.copyfile(backup, path)
        connection = _connect(path)
        # Readers with a cache must not take it for what they have read.
        connection.execute("UPDATE changes SET count = abs(random() % 1000000000)")
    except (OSError, sqlite3.Error, ImpetusError) as error:
        logger.error("the backup %s of the catalog cannot be used: %s", backup, error)
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return None
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    connection = connect(path)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        _check_pages(connection)
        _copy_older(path, _version(connection))
        migrate(connection)
        # Only notes: a table that was lost is made anew instead of giving up the catalog.
        m003_inspections(connection)
        _check_schema(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _copy_older(path: Path, version: int) -> None:
    """Keep a copy of a catalog that is about to be migrated.  Raises ImpetusError."""
    if not 0 < version < len(MIGRATIONS):
        return
    target = path.with_name(f"{path.name}.schema-{version}")
    try:
        back_up(path, target)
    except (OSError, sqlite3.Error) as error:
        raise ImpetusError(
            f"The catalog {path} has schema {version} and is migrated only after it was copied to "
            f"{target}, which failed: {error}. Check that the disk has free space, then start the "
            "server again."
        ) from error


def _check_pages(connection: sqlite3.Connection) -> None:
    """Raise DatabaseError if the file is damaged."""
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise damage(verdict)


def _check_schema(connection: sqlite3.Connection) -> None:
    """Raise DatabaseError if the tables are not those that the schema's number promises."""
    try:
        for statement in _SCHEMA:
            connection.execute(statement)
        counter = connection.execute("SELECT count FROM changes").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise
        raise damage(str(error)) from error
    if counter is None or not isinstance(counter[0], int):
        raise damage("its change counter is missing")
