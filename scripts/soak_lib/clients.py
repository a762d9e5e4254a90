"""Clients of the soak test: each sends one request after another and records how it ended."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from scripts.soak_lib.requests import Sent, next_request

REQUEST_LIMIT_S = 180.0
_LAST_EVENTS = ("[DONE]", "message_stop", "response.completed", "response.incomplete")
_LAST_EVENTS_OF_ERRORS = ("error", "response.failed")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended; times are monotonic seconds.

    `status` is 0 if no answer came.  `code` is the error's code, also of an error within a
    stream.  `has_ended` tells whether a stream had its last event.
    """

    kind: str
    right: frozenset[int]
    began_at: float
    ended_at: float
    status: int = 0
    code: str = ""
    message: str = ""
    has_ended: bool = True

    @property
    def is_right(self) -> bool:
        """Whether the request got what it had to get."""
        return self.status in self.right and not self.code_is_fault and self.has_ended

    @property
    def code_is_fault(self) -> bool:
        """Whether the code is that of a failure inside an answer that began well."""
        return self.status == 200 and bool(self.code)


@dataclass(slots=True)
class Pause:
    """Lets the clients work or rest, for example while the server starts again."""

    _works: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        """Let them work."""
        self._works.set()

    def begin(self) -> None:
        """Let each finish its request and then rest."""
        self._works.clear()

    async def wait(self) -> None:
        """Return when they may work."""
        await self._works.wait()


async def run_client(
    number: int,
    url: str,
    models: Sequence[str],
    pause: Pause,
    record: Callable[[Outcome], None],
    seed: int,
) -> None:
    """Send requests until cancelled."""
    chance = random.Random(f"{seed}/{number}")
    limits = httpx.Limits(max_keepalive_connections=1)
    async with httpx.AsyncClient(
        base_url=url, timeout=REQUEST_LIMIT_S, limits=limits, trust_env=False
    ) as client:
        while True:
            await pause.wait()
            outcome = await _send(client, next_request(chance, models))
            record(outcome)
            # A client that was refused does not ask again at once.
            busy = outcome.status in (0, 429, 503)
            await asyncio.sleep(chance.uniform(0.5, 2.0) if busy else chance.uniform(0.0, 0.3))


async def _send(client: httpx.AsyncClient, sent: Sent) -> Outcome:
    began_at = time.monotonic()

    def outcome(**fields: Any) -> Outcome:
        return Outcome(sent.kind, sent.right, began_at, time.monotonic(), **fields)

    headers = {"content-type": "application/json"}
    status = 0
    try:
        async with (
            asyncio.timeout(REQUEST_LIMIT_S),
            client.stream("POST", sent.path, content=sent.body, headers=headers) as answer,
        ):
            status = answer.status_code
            if status != 200 or not sent.is_stream:
                return outcome(status=status, **_problem(await answer.aread()))
            return outcome(status=status, **await _read_stream(answer, sent))
    except TimeoutError:
        return outcome(status=status, message="no end within the limit", has_ended=False)
    except httpx.HTTPError as problem:
        return outcome(status=status, message=repr(problem), has_ended=False)


async def _read_stream(answer: httpx.Response, sent: Sent) -> dict[str, Any]:
    """Read events to the last one; a client that leaves ended its stream itself."""
    count = 0
    found: dict[str, Any] = {}
    has_ended = False
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        count += 1
        if sent.leaves_after is not None and count > sent.leaves_after:
            return {}
        event = {"type": data} if data == "[DONE]" else json.loads(data)
        kind = event.get("type")
        if kind in _LAST_EVENTS_OF_ERRORS or isinstance(event.get("error"), dict):
            found = _problem(data.encode())
            has_ended = kind in _LAST_EVENTS_OF_ERRORS
        has_ended = has_ended or kind in _LAST_EVENTS
    return {**found, "has_ended": has_ended}


def _problem(body: bytes) -> dict[str, Any]:
    """Return the code and message of an error's body; nothing for an answer."""
    try:
        content = json.loads(body)
    except ValueError:
        return {"code": "not JSON", "message": body[:200].decode("utf-8", "replace")}
    error = content.get("error") or (content.get("response") or {}).get("error")
    if not isinstance(error, dict):
        return {}
    code = error.get("code") or error.get("type") or "no code"
    return {"code": str(code), "message": str(error.get("message", ""))[:300]}
