"""Asks the running server whether it is ready, without any proxy, and decides when to give up."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from enum import Enum
from http.client import HTTPException
from typing import Any

from core.settings import Settings

_INTERVAL_S = 5.0
_ANSWER_LIMIT_S = 2.0
_SILENCE_LIMIT_S = 60.0
_UNREADY_LIMIT_S = 180.0
_LEAST_FAILURES = 6
_DRAINING = "draining"

# What is raised where a server dies while it answers, or the answer is not that of this project.
BAD_ANSWER = (OSError, HTTPException, ValueError, LookupError, TypeError)

# The system's and the environment's proxies cannot reach this machine's loopback.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Readiness(Enum):
    """What `/readyz` says."""

    READY = "ready"
    UNREADY = "not ready"
    DRAINING = "draining"
    SILENT = "no answer"


def local_url(settings: Settings) -> str:
    """Return the server's root URL on this machine."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.port}"


def open_direct(request: urllib.request.Request, limit_s: float) -> Any:
    """Open a request without a proxy.  Raises as `urllib.request.urlopen` does."""
    return _DIRECT.open(request, timeout=limit_s)


def ask_readiness(settings: Settings) -> Readiness:
    """Return the answer of `/readyz`; blocks for up to 2 s."""
    request = urllib.request.Request(f"{local_url(settings)}/readyz")
    try:
        with open_direct(request, _ANSWER_LIMIT_S) as answer:
            return Readiness.READY if answer.status == 200 else Readiness.UNREADY
    except urllib.error.HTTPError as problem:
        return Readiness.DRAINING if _code(problem) == _DRAINING else Readiness.UNREADY
    except Exception:
        # http.client has exceptions of its own for an answer that is not HTTP.
        return Readiness.SILENT


def _code(problem: urllib.error.HTTPError) -> str:
    try:
        with problem:
            return str(json.load(problem)["error"]["code"])
    except BAD_ANSWER:
        return ""


class ReadinessHistory:
    """Decides from successive answers whether only a restart can help."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kind = Readiness.READY
        self._since = clock()
        self._count = 0

    def note(self, answer: Readiness) -> str:
        """Record an answer; return why the server must end, or an empty string.

        The number of answers counts too: after this process was stopped, time alone says nothing.
        """
        if answer is not self._kind:
            self._kind, self._since, self._count = answer, self._clock(), 0
        self._count += 1
        passed = self._clock() - self._since
        if self._count < _LEAST_FAILURES:
            return ""
        if answer is Readiness.SILENT and passed >= _SILENCE_LIMIT_S:
            return f"The server has not answered for {passed:.0f} s"
        if answer is Readiness.UNREADY and passed >= _UNREADY_LIMIT_S:
            return f"The server has not been ready for {passed:.0f} s"
        return ""


class ReadinessWatch:
    """Asks a server that has been ready every 5 s, on a thread of its own."""

    def __init__(self, settings: Settings, on_verdict: Callable[[], None]) -> None:
        """Start; `on_verdict` is called on the thread once `verdict` is set."""
        self.verdict = ""
        self._settings = settings
        self._on_verdict = on_verdict
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="readiness", daemon=True).start()

    def stop(self) -> None:
        """Stop asking; does not wait."""
        self._stopped.set()

    def _run(self) -> None:
        history = ReadinessHistory()
        while not self.verdict and not self._stopped.wait(_INTERVAL_S):
            self.verdict = history.note(ask_readiness(self._settings))
        if self.verdict:
            self._on_verdict()
