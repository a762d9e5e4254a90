"""Opens SQLite databases so that a committed transaction survives a kill and a power loss."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from catalog.database_errors import BUSY_MS


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection in autocommit mode, for any thread; creates the file if it is missing.

    Commits are in a write-ahead log that is flushed to the disk itself; SQLite's default on macOS
    stops at the disk's cache (https://www.sqlite.org/pragma.html#pragma_fullfsync).  Statements
    wait up to 5 s for other processes.  Blocks.  Raises sqlite3.Error.
    """
    connection = sqlite3.connect(
        path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if sys.platform == "darwin":
            connection.execute("PRAGMA fullfsync = 1")
            connection.execute("PRAGMA checkpoint_fullfsync = 1")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit all or nothing of what the body writes; waits for other writers.

    Raises sqlite3.Error.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
