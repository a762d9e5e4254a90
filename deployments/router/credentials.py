"""Verifies API keys and sessions for the router: API keys by a slow hash once, then in memory."""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from catalog.key_store import KeyStore
from core.errors import ImpetusError, RateLimited
from core.keys import ApiKey, api_key_id, hash_api_key

logger = logging.getLogger(__name__)

# How long the revocation of a key by another process may go unnoticed.
_LOOK_S = 1.0
_SAVE_S = 60.0
# Texts that wait for the slow hash, and wrong ones that are remembered.
_MAX_WAITING = 16
_MAX_WRONG = 1000


class StoredCredentials:
    """Implements `router.services.Credentials` over the key database; for one event loop."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open the database twice: what the event loop reads never waits for a writer.

        Raises ImpetusError if it cannot be opened.
        """
        self._reader = KeyStore(path)
        self._store = KeyStore(path)
        self._clock = clock
        self._now = now
        # Nobody who can read the memory of a crash gets a key, nor can prepare texts that collide.
        self._hash_key = secrets.token_bytes(32)
        self._version = self._reader.data_version()
        # By id, which is random: a new key never has the id of a revoked one.
        self._stored = {one.key.id: one for one in self._reader.stored()}
        self._verified: dict[bytes, str] = {}
        self._wrong: dict[bytes, None] = {}
        # When known sessions end, in Unix seconds.
        self._sessions: dict[bytes, float] = {}
        self._waiting: set[bytes] = set()
        self._verifying = asyncio.Lock()
        self._used: dict[str, float] = {}
        self._look_at = clock() + _LOOK_S

    @property
    def has_keys(self) -> bool:
        """Whether there are keys; sees those of other processes after a second."""
        if self._clock() >= self._look_at:
            self._look()
        return bool(self._stored)

    def known_key(self, text: bytes) -> ApiKey | None:
        """Return the key with this text if it is valid and was verified before."""
        if self._clock() >= self._look_at:
            self._look()
        return self._valid(self._verified.get(self._fast_hash(text)))

    async def verify_key(self, text: bytes) -> ApiKey | None:
        """Return the key with this text if it is valid.  Raises RateLimited.

        One slow hash runs at a time, on a thread; a text is hashed once, however often it is sent.
        """
        key_id = api_key_id(text)
        if key_id is None or self._valid(key_id, is_used=False) is None:
            return None
        digest = self._fast_hash(text)
        if digest in self._wrong:
            return None
        if digest not in self._waiting and len(self._waiting) >= _MAX_WAITING:
            raise RateLimited(
                f"{_MAX_WAITING} API keys are being verified; send the request again.",
                retry_after_s=1,
            )
        self._waiting.add(digest)
        try:
            async with self._verifying:
                await self._verify(text, key_id, digest)
        finally:
            self._waiting.discard(digest)
        return self._valid(self._verified.get(digest))

    async def _verify(self, text: bytes, key_id: str, digest: bytes) -> None:
        stored = self._stored.get(key_id)
        if stored is None or digest in self._verified or digest in self._wrong:
            return
        found = await asyncio.to_thread(hash_api_key, text, stored.salt)
        if key_id not in self._stored:
            # It was revoked meanwhile.
            return
        if hmac.compare_digest(found, stored.hash):
            self._verified[digest] = key_id
            return
        if len(self._wrong) >= _MAX_WRONG:
            self._wrong.pop(next(iter(self._wrong)))
        self._wrong[digest] = None

    def _fast_hash(self, text: bytes) -> bytes:
        return hashlib.blake2b(text, key=self._hash_key, digest_size=32).digest()

    def _valid(self, key_id: str | None, *, is_used: bool = True) -> ApiKey | None:
        stored = self._stored.get(key_id) if key_id is not None else None
        now = self._now()
        if stored is None or not stored.key.is_valid_at(now):
            return None
        if is_used:
            self._used[stored.key.id] = now
        return stored.key

    def _look(self) -> None:
        """Read the keys again if the database has changed; if that fails, keep those known."""
        self._look_at = self._clock() + _LOOK_S
        try:
            version = self._reader.data_version()
            if version == self._version:
                return
            found = self._reader.stored()
        except ImpetusError as problem:
            logger.error("changes of API keys are not seen: %s", problem.message)
            return
        self._version = version
        self._sessions.clear()
        self._stored = {one.key.id: one for one in found}
        self._verified = {
            digest: key_id for digest, key_id in self._verified.items() if key_id in self._stored
        }

    async def keys(self) -> Sequence[ApiKey]:
        """Return all keys with their last use.  Raises Unavailable."""
        found = await asyncio.to_thread(self._store.stored)
        return [_with_use(one.key, self._used.get(one.key.id)) for one in found]

    async def create_key(
        self, name: str, scopes: Sequence[str], expires_at: float | None
    ) -> tuple[ApiKey, str]:
        """Store a new key; return it and its text.  Raises RequestError, Unavailable."""
        made = await asyncio.to_thread(
            lambda: self._store.create(name, scopes, now=self._now(), expires_at=expires_at)
        )
        self._look()
        return made

    async def revoke_key(self, key_id: str) -> None:
        """Delete a key; it counts at once.  Raises NotFound, Unavailable."""
        await asyncio.to_thread(self._store.revoke, key_id)
        self._look()

    async def open_session(self, code: str) -> str | None:
        """Return the token of a new session; None for a code that is used or was never given."""
        return await asyncio.to_thread(lambda: self._store.open_session(code, now=self._now()))

    async def has_session(self, token: str) -> bool:
        """Return whether this is the token of a session that has not ended."""
        digest = self._fast_hash(token.encode("utf-8", "replace"))
        end = self._sessions.get(digest)
        if end is None:
            end = await asyncio.to_thread(self._store.session_end, token)
            if end is None:
                return False
            self._sessions[digest] = end
        if self._now() < end:
            return True
        self._sessions.pop(digest, None)
        return False

    async def close_session(self, token: str) -> None:
        """End a session, if there is one."""
        await asyncio.to_thread(self._store.close_session, token)
        self._sessions.pop(self._fast_hash(token.encode("utf-8", "replace")), None)

    async def save_uses(self) -> None:
        """Store once a minute when keys were used last; never returns."""
        while True:
            await asyncio.sleep(_SAVE_S)
            used, self._used = self._used, {}
            await asyncio.to_thread(self._save, used)

    def _save(self, used: Mapping[str, float]) -> None:
        if not used:
            return
        try:
            self._store.record_use(used)
        except ImpetusError as problem:
            logger.warning("the last use of API keys is not stored: %s", problem.message)

    def close(self) -> None:
        """Store the last uses and close the database.  Blocks briefly."""
        self._save(self._used)
        self._store.close()
        self._reader.close()


def _with_use(key: ApiKey, used_at: float | None) -> ApiKey:
    if used_at is None:
        return key
    return replace(key, last_used_at=max(used_at, key.last_used_at or 0.0))
