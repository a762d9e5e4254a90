"""Remembers what trials found, and lets each grammar be tried by one thread at a time."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait

from backends.cancellation import Cancelled, check_cancelled
from backends.grammar.trial import Verdict
from backends.watch import unwatched

_MAX_VERDICTS = 1024
_POLL_S = 0.2


class Verdicts:
    """The latest 1,024 verdicts.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()
        self._trying: dict[bytes, Future[Verdict]] = {}

    def get(self, key: bytes, trial: Callable[[], Verdict]) -> Verdict:
        """Return the verdict about a grammar, from `trial` if it is not known.

        Blocks for the trial, or for that of another thread about the same grammar.  Raises what
        the trial raises, which is not remembered, and Cancelled.
        """
        while True:
            with self._lock:
                known = self._known.get(key)
                running = self._trying.get(key)
                if known is None and running is None:
                    own = self._trying[key] = Future()
            if known is not None:
                return known
            if running is None:
                return self._try(key, trial, own)
            # Who tries it may be cancelled; then it is tried by one of those that wait.
            with contextlib.suppress(Cancelled):
                return _wait(running)
            check_cancelled()

    def _try(self, key: bytes, trial: Callable[[], Verdict], own: Future[Verdict]) -> Verdict:
        try:
            verdict = trial()
        except BaseException as problem:
            with self._lock:
                del self._trying[key]
            own.set_exception(problem)
            raise
        with self._lock:
            self._known[key] = verdict
            while len(self._known) > _MAX_VERDICTS:
                self._known.popitem(last=False)
            del self._trying[key]
        own.set_result(verdict)
        return verdict


def _wait(running: Future[Verdict]) -> Verdict:
    with unwatched():
        while True:
            check_cancelled()
            if wait([running], _POLL_S).done:
                return running.result()
