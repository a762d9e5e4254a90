"""The catalog's schema, one numbered step after the other."""

import sqlite3
from collections.abc import Callable, Sequence
from typing import TypeAlias

from core.errors import ImpetusError

Migration: TypeAlias = Callable[[sqlite3.Connection], None]


def m001_models(connection: sqlite3.Connection) -> None:
    """Create models, user aliases and the counter that every change raises."""
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
    # A random start: a rebuilt catalog must not look unchanged to a reader's cache.
    connection.execute("INSERT INTO changes VALUES (1, abs(random() % 1000000000))")


MIGRATIONS: tuple[Migration, ...] = (m001_models,)


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the schema up to date, each step in its own transaction.

    `connection` is in autocommit mode.  Raises ImpetusError for a schema newer than ours, which
    stays untouched, and for a failing step, which is rolled back.
    """
    version = _version(connection)
    if version > len(migrations):
        raise ImpetusError(
            f"The catalog was written by a newer version of this program (schema {version}, known "
            f"is {len(migrations)}). Install that version, or set another IMPETUS_HOME."
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
                f"Updating the catalog to schema {number} failed and was undone: {error}"
            ) from error


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
