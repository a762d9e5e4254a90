"""Follows another process by long polls, while anybody reads the events that come from it."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from core.errors import ImpetusError, Unavailable
from deployments.serve.handles import ReplicaDied, call
from router.events.hub import Publish
from router.events.messages import ResetEvent

logger = logging.getLogger(__name__)

POLL_S = 10.0
# The other side answers within `POLL_S`, unless it waits for its own start.
_POLL_LIMIT_S = 25.0
_REFRESH_LIMIT_S = 3.0
_FIRST_BACK_OFF_S = 0.5
_LONGEST_BACK_OFF_S = 10.0
_REFRESH_TRIES = 3

Answer = TypeVar("Answer")


class PolledSource(ABC, Generic[Answer]):
    """One long poll at a time between `start` and `stop`; belongs to one event loop.

    The first answer is what is known; each later one is compared with it and published.  A process
    that does not answer leaves what is known valid, and its successor's answer is compared with it.
    """

    def __init__(self, name: str, pause_s: float) -> None:
        """`name` is that of the other process, for people.

        `pause_s` is the time between two polls: what changes meanwhile comes together.
        """
        self._name = name
        self._pause_s = pause_s
        self._publish: Publish | None = None
        self._is_started = asyncio.Event()
        self._version = -1
        self._problem = ""
        # Whether a client was told that this part is missing.
        self._was_missing = False

    @abstractmethod
    def _ask(self, version: int, limit_s: float) -> Any:
        """Return the response of a call that waits `limit_s` for a version other than this."""

    @abstractmethod
    def _version_of(self, answer: Answer) -> int:
        """Return the version of an answer."""

    @abstractmethod
    def _apply(self, answer: Answer, publish: Publish | None) -> None:
        """Take over an answer; publish what is other than before, or nothing (None)."""

    @abstractmethod
    def _forget(self) -> None:
        """Forget what is known."""

    @property
    def is_known(self) -> bool:
        """Whether there was an answer since the start."""
        return self._version >= 0

    def problem(self) -> str:
        """Return why this part is outdated or missing; empty if it is not."""
        if self.is_known:
            return self._problem
        self._was_missing = True
        return self._problem or f"{self._name} has not answered yet."

    def start(self, publish: Publish) -> None:
        """Begin to follow."""
        self._publish = publish
        self._is_started.set()

    def stop(self) -> None:
        """Follow no longer: an open poll is the last one, and its answer is dropped."""
        self._publish = None
        self._is_started.clear()
        self._version, self._problem, self._was_missing = -1, "", False
        self._forget()

    async def run(self) -> None:
        """Follow until cancelled."""
        back_off_s = _FIRST_BACK_OFF_S
        while True:
            await self._is_started.wait()
            if await self._poll(POLL_S, _POLL_LIMIT_S):
                back_off_s = _FIRST_BACK_OFF_S
                await asyncio.sleep(self._pause_s)
            else:
                await asyncio.sleep(back_off_s)
                back_off_s = min(2 * back_off_s, _LONGEST_BACK_OFF_S)

    async def refresh(self) -> None:
        """Ask now; a process that does not answer in time leaves what is known."""
        for _ in range(_REFRESH_TRIES):
            before = self._version
            await self._poll(0.0, _REFRESH_LIMIT_S)
            # An open poll may have answered meanwhile, with what was true before this was asked.
            if self._problem or self._version == before:
                return

    async def _poll(self, wait_s: float, limit_s: float) -> bool:
        publish, version = self._publish, self._version
        try:
            async with asyncio.timeout(limit_s):
                answer: Answer = await call(self._ask(version, wait_s))
        except (TimeoutError, ImpetusError) as problem:
            self._note_problem(publish, problem)
            return False
        except Exception as problem:
            # Serve's own errors while it replaces the process.
            logger.info("no answer for the event stream: %r", problem)
            self._note_problem(publish, problem)
            return False
        if publish is None or publish is not self._publish or version != self._version:
            # Stopped meanwhile, or overtaken by another call.
            return True
        self._take(answer, publish)
        return True

    def _note_problem(self, publish: Publish | None, problem: Exception) -> None:
        if publish is not None and publish is self._publish:
            is_dead = not isinstance(problem, Unavailable) or isinstance(problem, ReplicaDied)
            self._problem = f"{self._name} does not answer." if is_dead else str(problem)

    def _take(self, answer: Answer, publish: Publish) -> None:
        self._problem = ""
        if self._version_of(answer) == self._version:
            return
        is_first = not self.is_known
        self._version = self._version_of(answer)
        self._apply(answer, None if is_first else publish)
        if is_first and self._was_missing:
            publish(ResetEvent(at=time.time(), reason="source_restarted"))
