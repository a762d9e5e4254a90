"""Remembers requests that ended their model's process, so that the same one is not run again."""

import asyncio
import time
from collections.abc import Callable
from hashlib import blake2b

from core.errors import CrashingRequest

_KEPT_S = 300.0
_MOST = 64


class CrashingRequests:
    """The last 64 such requests of five minutes.  Belongs to one event loop.

    A request's content is anything whose `repr` has all that is computed; it is hashed only while
    a request to the same model is remembered, on a thread, as a prompt may be long.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended: dict[tuple[str, bytes], float] = {}

    async def check(self, model_id: str, content: object) -> None:
        """Raise CrashingRequest for a request that is remembered."""
        if not self._ended:
            return
        now = self._clock()
        self._ended = {key: at for key, at in self._ended.items() if now - at < _KEPT_S}
        if not any(name == model_id for name, _ in self._ended):
            return
        digest = await asyncio.to_thread(_digest, content)
        ended_at = self._ended.get((model_id, digest))
        if ended_at is not None:
            raise CrashingRequest(
                f"This request ended the process of {model_id} twice {now - ended_at:.0f} s ago, "
                f"so it is refused for {_KEPT_S / 60:.0f} minutes. Change it: leave out unusually "
                "long words, a grammar or a schema, or shorten the prompt."
            )

    async def note(self, model_id: str, content: object) -> None:
        """Remember a request."""
        digest = await asyncio.to_thread(_digest, content)
        self._ended[model_id, digest] = self._clock()
        for key in list(self._ended)[:-_MOST]:
            del self._ended[key]


def _digest(content: object) -> bytes:
    return blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()
