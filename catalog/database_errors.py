"""What went wrong with the catalog's database, for logs and users."""

import sqlite3
from pathlib import Path

from core.errors import CatalogNotWritten, ImpetusError, Unavailable
from core.files import why

# How long a statement waits for another process.
BUSY_MS = 5000
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_CAUSES = {
    sqlite3.SQLITE_BUSY: f"another program has kept it locked for {BUSY_MS / 1000:g} s; close it",
    sqlite3.SQLITE_LOCKED: "another request is changing it",
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_IOERR: "the disk reported an error, or is full",
    sqlite3.SQLITE_READONLY: "the file or its folder is read-only; fix its permissions",
    sqlite3.SQLITE_PERM: "permission was denied; fix its permissions",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: its folder may be read-only, the disk full, or "
    "this process have too many open files",
    sqlite3.SQLITE_NOMEM: "there is not enough memory",
}


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the error tells that the database file is damaged."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def damage(reason: str) -> sqlite3.DatabaseError:
    """Return the error that SQLite raises for a damaged file."""
    error = sqlite3.DatabaseError(reason)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def cause(error: Exception) -> str:
    """Return what went wrong, in words that a user understands."""
    if isinstance(error, OSError):
        return why(error)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return f"{_CAUSES[code]} ({error})" if code in _CAUSES else str(error)


def failure(path: Path, error: sqlite3.Error) -> ImpetusError:
    """Return the error for a user whose request needed the catalog."""
    if is_damage(error):
        return Unavailable(
            f"The catalog {path} was damaged ({error}). It was moved aside and is being filled "
            "again from the model folders; try again in a minute.",
            retry_after_s=60,
        )
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _CAUSES:
        return CatalogNotWritten(
            f"The catalog {path} cannot be used: {cause(error)}. Models that are known can still "
            "be used; the change was not stored.",
            retry_after_s=10,
        )
    return ImpetusError(f"The catalog {path} could not be read or written: {error}.")
