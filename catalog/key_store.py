"""Stores API keys, sign-in links and sessions in SQLite: hashes only, readable by their owner."""

import hashlib
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from catalog.connection import connect, transaction
from catalog.database_errors import cause
from core.errors import ImpetusError, NotFound, RequestError, Unavailable
from core.files import make_private
from core.keys import SCOPES, ApiKey, Scope, hash_api_key, new_api_key

MAX_KEYS = 1000
MAX_NAME = 100
_MAX_LINKS = 100
_MAX_SESSIONS = 1000
_LINK_S = 3600.0
_SESSION_S = 7 * 24 * 3600.0
_VERSION = 1
_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS keys (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        scopes TEXT NOT NULL,
        salt BLOB NOT NULL,
        hash BLOB NOT NULL,
        created_at REAL NOT NULL,
        expires_at REAL,
        last_used_at REAL
    ) STRICT
    """,
    "CREATE TABLE IF NOT EXISTS links (hash BLOB PRIMARY KEY, expires_at REAL NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS sessions (hash BLOB PRIMARY KEY, expires_at REAL NOT NULL) STRICT",
)
_COLUMNS = "id, name, scopes, salt, hash, created_at, expires_at, last_used_at"


@dataclass(frozen=True, slots=True)
class StoredKey:
    """An API key with what its text is checked against."""

    key: ApiKey
    salt: bytes
    hash: bytes


class KeyStore:
    """The keys of one server.  Every call blocks briefly; thread-safe, for several processes.

    A damaged file is not replaced: without its keys the server would be open.  Raises ImpetusError
    if the file cannot be opened, is damaged or has a newer schema, and Unavailable while it cannot
    be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._connection = _open(path)
        except (OSError, sqlite3.Error) as problem:
            raise ImpetusError(
                f"The API keys in {path} cannot be opened: {cause(problem)}. Restore the file from "
                "a backup, or delete it and create new keys with scripts/keys."
            ) from problem

    def close(self) -> None:
        """Close the file; may be called twice."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as problem:
                raise Unavailable(
                    f"The API keys in {self._path} cannot be used: {cause(problem)}.",
                    retry_after_s=10,
                ) from problem

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Run the body as one transaction."""
        with self._reading() as connection, transaction(connection):
            yield connection

    def data_version(self) -> int:
        """Return a number that differs once another connection has written; a few microseconds."""
        with self._reading() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    def stored(self) -> list[StoredKey]:
        """Return all keys, expired ones as well, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created_at, id")
            return [_stored(row) for row in rows]

    def create(
        self, name: str, scopes: Iterable[str], *, now: float, expires_at: float | None = None
    ) -> tuple[ApiKey, str]:
        """Store a new key; return it and its text, which is not stored.  Blocks about 50 ms.

        Raises RequestError for an invalid name, scope or expiry, and for more than 1,000 keys.
        """
        wanted = _checked_scopes(scopes)
        _check_name(name)
        if expires_at is not None and not now < expires_at < float("inf"):
            raise RequestError("The key would have expired already.", param="expires_at")
        key_id, text = new_api_key()
        salt = secrets.token_bytes(16)
        key = ApiKey(key_id, name, wanted, now, expires_at)
        row = (key_id, name, ",".join(sorted(wanted)), salt, hash_api_key(text.encode(), salt))
        with self._writing() as connection:
            if connection.execute("SELECT count(*) FROM keys").fetchone()[0] >= MAX_KEYS:
                raise RequestError(
                    f"There are {MAX_KEYS:,} API keys, the most that are kept; revoke one first."
                )
            connection.execute(
                f"INSERT INTO keys ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (*row, now, expires_at),
            )
        return key, text

    def revoke(self, key_id: str) -> None:
        """Delete a key.  Raises NotFound."""
        unknown = NotFound(f"There is no API key {key_id[:50]!r}.", param="id")
        if not key_id.isascii():
            raise unknown
        with self._writing() as connection:
            if not connection.execute("DELETE FROM keys WHERE id = ?", (key_id,)).rowcount:
                raise unknown

    def record_use(self, used: Mapping[str, float]) -> None:
        """Store when keys, by id, were used last."""
        with self._writing() as connection:
            connection.executemany(
                "UPDATE keys SET last_used_at = max(coalesce(last_used_at, 0), ?) WHERE id = ?",
                [(at, key_id) for key_id, at in used.items()],
            )

    def create_link_code(self, *, now: float) -> str:
        """Return a code that opens one session within the next hour."""
        code = secrets.token_urlsafe(32)
        with self._writing() as connection:
            _add(connection, "links", code, now + _LINK_S, now, _MAX_LINKS)
        return code

    def open_session(self, code: str, *, now: float) -> str | None:
        """Return the token of a new session of 7 days; None if the code is not valid (any more)."""
        token = secrets.token_urlsafe(32)
        with self._writing() as connection:
            found = connection.execute(
                "DELETE FROM links WHERE hash = ? RETURNING expires_at", (_fast_hash(code),)
            ).fetchone()
            if found is None or found[0] <= now:
                return None
            _add(connection, "sessions", token, now + _SESSION_S, now, _MAX_SESSIONS)
        return token

    def session_end(self, token: str) -> float | None:
        """Return when a session expires, in Unix seconds; None if there is no such session."""
        with self._reading() as connection:
            found = connection.execute(
                "SELECT expires_at FROM sessions WHERE hash = ?", (_fast_hash(token),)
            ).fetchone()
        return None if found is None else float(found[0])

    def close_session(self, token: str) -> None:
        """End a session, if there is one."""
        with self._writing() as connection:
            connection.execute("DELETE FROM sessions WHERE hash = ?", (_fast_hash(token),))


def has_stored_keys(path: Path) -> bool:
    """Return whether the database has any key; it is not created.  Raises as KeyStore does."""
    if not path.exists():
        return False
    store = KeyStore(path)
    try:
        return bool(store.stored())
    finally:
        store.close()


def _open(path: Path) -> sqlite3.Connection:
    """Open the database, readable by its owner only.  Raises OSError, sqlite3.Error."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_private(path)
    connection = connect(path)
    try:
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"the file is damaged ({verdict})")
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    """Create the tables.  Raises DatabaseError for a newer schema."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > _VERSION:
        raise sqlite3.DatabaseError(
            f"a newer version of Impetus wrote it (its schema is {version}, this version supports "
            f"up to {_VERSION})"
        )
    connection.execute("BEGIN IMMEDIATE")
    for table in _TABLES:
        connection.execute(table)
    connection.execute(f"PRAGMA user_version = {_VERSION}")
    connection.execute("COMMIT")
    connection.execute(f"SELECT {_COLUMNS} FROM keys LIMIT 0")


def _add(
    connection: sqlite3.Connection, table: str, text: str, expires_at: float, now: float, most: int
) -> None:
    """Insert the hash of a code or token; drop expired ones, and the oldest beyond `most`."""
    connection.execute(f"DELETE FROM {table} WHERE expires_at <= ?", (now,))
    connection.execute(f"INSERT INTO {table} VALUES (?, ?)", (_fast_hash(text), expires_at))
    connection.execute(
        f"DELETE FROM {table} WHERE hash IN "
        f"(SELECT hash FROM {table} ORDER BY expires_at DESC LIMIT -1 OFFSET ?)",
        (most,),
    )


def _fast_hash(text: str) -> bytes:
    """Hash a random text of 256 bits, for which a slow hash adds nothing."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _stored(
    row: tuple[str, str, str, bytes, bytes, float, float | None, float | None],
) -> StoredKey:
    key_id, name, scopes, salt, digest, created_at, expires_at, last_used_at = row
    known = frozenset(scope for scope in SCOPES if scope in scopes.split(","))
    return StoredKey(
        ApiKey(key_id, name, known, created_at, expires_at, last_used_at), salt, digest
    )


def _checked_scopes(scopes: Iterable[str]) -> frozenset[Scope]:
    wanted = set(scopes)
    if unknown := sorted(wanted - SCOPES):
        raise RequestError(
            f"There is no scope {unknown[0][:50]!r}; there are {', '.join(sorted(SCOPES))}.",
            param="scopes",
        )
    if not wanted:
        raise RequestError("A key needs at least one scope.", param="scopes")
    return frozenset(scope for scope in SCOPES if scope in wanted)


def _check_name(name: str) -> None:
    if not (1 <= len(name) <= MAX_NAME and name.isprintable() and name.strip() == name):
        raise RequestError(
            f"The name of a key has 1 to {MAX_NAME} printable characters, without spaces around "
            "it.",
            param="name",
        )
