"""Secret tokens as files that only their owner can read, and the texts and hashes of API keys."""

import fcntl
import hashlib
import os
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from core.errors import ImpetusError
from core.files import write_atomically

MANAGEMENT_TOKEN = "management_token"
_TOKEN = re.compile(r"[0-9a-f]{64}")

Scope: TypeAlias = Literal["inference", "manage", "read"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
# The id is part of the key, so that one hash decides whether a key is valid.
_API_KEY = re.compile(rb"imp-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
# 16 MiB and about 50 ms.  Source: RFC 7914, section 2; OpenSSL allows 32 MiB by default.
_SCRYPT_COST, _SCRYPT_BLOCK = 2**14, 8


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of an API key, without its secret; times are in Unix seconds.

    `expires_at` None: it never expires.  `last_used_at` None: it was not used yet.
    """

    id: str
    name: str
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None = None
    last_used_at: float | None = None

    def described(self) -> dict[str, Any]:
        """Return what may be shown of the key, JSON-serializable."""
        return {**asdict(self), "scopes": sorted(self.scopes)}

    def is_valid_at(self, now: float) -> bool:
        """Return whether the key has not expired."""
        return self.expires_at is None or now < self.expires_at


def new_api_key() -> tuple[str, str]:
    """Return the id and the text of a new API key; the text has 256 random bits."""
    key_id = secrets.token_hex(6)
    return key_id, f"imp-{key_id}-{secrets.token_urlsafe(32)}"


def api_key_id(text: bytes) -> str | None:
    """Return the id in the text of an API key; None if it cannot be one."""
    found = _API_KEY.fullmatch(text)
    return None if found is None else found[1].decode("ascii")


def hash_api_key(text: bytes, salt: bytes) -> bytes:
    """Return the 32 bytes that are stored of an API key.  Blocks about 50 ms, without the GIL."""
    return hashlib.scrypt(text, salt=salt, n=_SCRYPT_COST, r=_SCRYPT_BLOCK, p=1, dklen=32)


def key_file(home: Path, name: str) -> Path:
    """Return the file of a secret token under `home`; it is created if missing or damaged.

    The file appears complete or not at all, with mode 0600, so several processes may call this at
    once.  Raises ImpetusError if it cannot be written.
    """
    path = home / "keys" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_valid(path):
            _create(path)
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as problem:
        raise ImpetusError(
            f"The key file {str(path)!r} cannot be written: {problem.strerror}. Make the folder "
            "writable, or choose another with IMPETUS_HOME."
        ) from problem
    return path


def read_key(home: Path, name: str) -> str:
    """Return the token of `key_file`.  Raises ImpetusError."""
    path = key_file(home, name)
    try:
        return path.read_text().strip()
    except OSError as problem:
        raise ImpetusError(
            f"The key file {str(path)!r} cannot be read: {problem.strerror}."
        ) from problem


def _is_valid(path: Path) -> bool:
    try:
        return _TOKEN.fullmatch(path.read_text(errors="replace").strip()) is not None
    except FileNotFoundError:
        return False


def _create(path: Path) -> None:
    """Create the file; of several processes that do so at once, one wins."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not _is_valid(path):
            write_atomically(path, secrets.token_hex(32).encode())
    finally:
        os.close(folder)
