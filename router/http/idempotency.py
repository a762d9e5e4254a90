"""Requests with the header `Idempotency-Key`: the same key gets the same answer for a day.

Source: the IETF's draft "The Idempotency-Key HTTP Header Field".
"""

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from core.errors import IdempotencyKeyReused, RequestError
from core.units import MIB
from router.http.access import caller_of

HEADER = "idempotency-key"
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_KEPT_S = 24 * 3600.0
_MOST_ANSWERS = 1000
_MOST_BYTES = 8 * MIB
# Rough memory of an answer apart from its body.
_ANSWER_BYTES = 2048


@dataclass(slots=True)
class _Given:
    """A request by the hash of its body; `answer` is None while it runs."""

    digest: bytes
    begun_at: float
    done: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Response | None = None

    @property
    def bytes(self) -> int:
        return _ANSWER_BYTES + (len(self.answer.body) if self.answer is not None else 0)


class KeptAnswers:
    """Keeps answers by path, caller and key; for one event loop.

    At most 1,000 answers and 8 MiB are kept, the oldest are forgotten first, and all at the end of
    the process.  Errors are not kept: what failed may be tried again with the same key.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is in seconds."""
        self._clock = clock
        self._given: OrderedDict[tuple[str, ...], _Given] = OrderedDict()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._given)

    def once(self, endpoint: Endpoint) -> Endpoint:
        """Return `endpoint` such that it runs once for all requests with the same key and body.

        One that comes while the first runs waits for its answer.  Raises RequestError for a
        malformed key, IdempotencyKeyReused for one that came with another body.
        """

        @wraps(endpoint)
        async def run_once(request: Request) -> Response:
            key = request.headers.get(HEADER)
            if key is None:
                return await endpoint(request)
            if not _KEY.fullmatch(key):
                raise RequestError(
                    "Idempotency-Key: send 1 to 255 visible ASCII characters, such as a UUID.",
                    param=HEADER,
                )
            place = (request.url.path, caller_of(request.scope) or "", key)
            return await self._answer(endpoint, request, place)

        return run_once

    async def _answer(
        self, endpoint: Endpoint, request: Request, place: tuple[str, ...]
    ) -> Response:
        digest = await _digest(request)
        while (earlier := self._fresh(place)) is not None:
            if earlier.digest != digest:
                raise IdempotencyKeyReused(
                    "This Idempotency-Key was sent with another body within 24 hours; send a new "
                    "key with a new request.",
                    param=HEADER,
                )
            if earlier.answer is not None:
                return _again(earlier.answer)
            # If that one fails, the next runs.
            await earlier.done.wait()
        given = self._given[place] = _Given(digest, self._clock())
        try:
            answer = await endpoint(request)
        except BaseException:
            del self._given[place]
            raise
        finally:
            given.done.set()
        if answer.status_code >= 400:
            del self._given[place]
            return answer
        given.answer = answer
        self.used_bytes += given.bytes
        self._forget_oldest()
        return answer

    def _fresh(self, place: tuple[str, ...]) -> _Given | None:
        given = self._given.get(place)
        is_old = given is not None and self._clock() - given.begun_at >= _KEPT_S
        if given is None or given.answer is None or not is_old:
            return given
        self._forget(place)
        return None

    def _forget_oldest(self) -> None:
        """Forget the oldest complete answers until the rest is within both bounds."""
        complete = [place for place, given in self._given.items() if given.answer is not None]
        for place in complete:
            if len(self._given) <= _MOST_ANSWERS and self.used_bytes <= _MOST_BYTES:
                return
            self._forget(place)

    def _forget(self, place: tuple[str, ...]) -> None:
        self.used_bytes -= self._given.pop(place).bytes


async def _digest(request: Request) -> bytes:
    """Return the hash of the body, which stays there for the endpoint."""
    try:
        return hashlib.sha256(await request.body()).digest()
    except ClientDisconnect as error:
        raise RequestError("The client disconnected before its request was complete.") from error


def _again(answer: Response) -> Response:
    """Return a copy of an answer that says what it is."""
    headers = {**answer.headers, "idempotency-replayed": "true"}
    return Response(answer.body, answer.status_code, headers)
