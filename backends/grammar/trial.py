"""Tries a costly grammar in a limited child process before this process compiles it."""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from backends.cancellation import check_cancelled
from backends.grammar.vocabulary import Vocabulary
from backends.watch import unwatched
from core.child import AnswerTooLong, Child, ChildEnded
from core.errors import Unavailable
from core.units import MIB, format_bytes

# On a busy machine, a child of low priority takes several times its processor time.
LIMIT_S = 30.0
CPU_LIMIT_S = 4
COMPILE_LIMIT_S = 2.5
MASK_LIMIT_S = 0.1
GROWTH_LIMIT_BYTES = 192 * MIB
_MEMORY_LIMIT_BYTES = 640 * MIB
# In this process: so many children run at once, and so many grammars wait for them.
MAX_RUNNING = 2
MAX_WAITING = 6
_ANSWER_LIMIT_BYTES = MIB
_POLL_S = 0.2
_CODE_FOLDER = Path(__file__).resolve().parents[2]
# Its imports give way as well.
_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); from core.child import give_way; give_way(); "
    "from backends.grammar.trial_worker import main; main()"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial found: why the grammar is refused, empty if allowed, and the bytes it takes."""

    refusal: str
    grown_bytes: int = 0


_OVER_LIMITS = Verdict(
    "compiling it takes more than the limit of processor time, memory or stack "
    f"({CPU_LIMIT_S} s, {format_bytes(_MEMORY_LIMIT_BYTES)})"
)


class _OverMemory(Exception):
    """The child takes more memory than it may."""


class _Queue:
    """Bounds the trials of this process, so that costly grammars leave memory and threads free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_RUNNING)
        self._count = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a slot and hold it.  Raises Unavailable if too many wait, and Cancelled."""
        with self._lock:
            if self._count >= MAX_RUNNING + MAX_WAITING:
                raise Unavailable(
                    f"{self._count} costly schemas or regexes are being checked at the moment. "
                    "Try again in a few seconds.",
                    retry_after_s=5,
                )
            self._count += 1
        try:
            with unwatched():
                while not self._slots.acquire(timeout=_POLL_S):
                    check_cancelled()
            try:
                yield
            finally:
                self._slots.release()
        finally:
            with self._lock:
                self._count -= 1


_queue = _Queue()


class GrammarTrial:
    """Tries grammars for one vocabulary.  Thread-safe; each trial has a process of its own."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ends = list(vocabulary.ends)
        special, lengths = list(vocabulary.special), list(map(len, vocabulary.tokens))
        head = json.dumps({"special": special, "lengths": lengths}).encode("ascii")
        self._vocabulary = head + b"\n" + b"".join(vocabulary.tokens)

    def run(self, grammar: str) -> Verdict:
        """Return what compiling `grammar` takes, or why it is refused.

        Blocks up to 30 s, usually for half a second, and before that for earlier trials.  Raises
        Unavailable if the child does not start, gets no processor time or is killed from outside,
        or if too many grammars wait; and Cancelled.
        """
        with _queue.turn():
            return self._run(grammar)

    def _run(self, grammar: str) -> Verdict:
        payload = self._payload(grammar)
        try:
            child = Child(
                [sys.executable, "-I", "-c", _WORKER, str(_CODE_FOLDER)],
                {},
                answer_limit_bytes=_ANSWER_LIMIT_BYTES,
                keeps_stderr=True,
            )
        except OSError as error:
            raise Unavailable(
                "The process that tries grammars did not start. Check the machine's limits of "
                "memory and processes, then try again."
            ) from error
        try:
            return _verdict(json.loads(_exchange(child, payload)))
        except TimeoutError:
            if _used_cpu_s(child.pid) >= CPU_LIMIT_S:
                return _OVER_LIMITS
            raise Unavailable(
                "The machine is too busy to check the schema or regex. Try again in a few seconds.",
                retry_after_s=5,
            ) from None
        except _OverMemory:
            return _OVER_LIMITS
        except AnswerTooLong:
            return Verdict("the message about it is too long")
        except ChildEnded:
            _check_exit(child.close(grace_s=1.0), child.stderr_tail)
            return _OVER_LIMITS
        finally:
            child.close()

    def _payload(self, grammar: str) -> bytes:
        request = {
            "grammar": grammar,
            "ends": self._ends,
            "memory_bytes": _MEMORY_LIMIT_BYTES,
            "cpu_s": CPU_LIMIT_S,
        }
        return json.dumps(request).encode("ascii") + b"\n" + self._vocabulary


def _check_exit(code: int, stderr_tail: str) -> None:
    """Raise Unavailable if the grammar is not the cause of the child's end."""
    # A positive code is Python's: MemoryError, or a broken installation.
    if code > 0 and "MemoryError" not in stderr_tail:
        raise Unavailable(
            "The process that tries grammars failed. Check the server's log and free memory, then "
            "try again."
        )
    # None of the child's own limits sends this signal: the machine is short of memory.
    if code == -signal.SIGKILL:
        raise Unavailable(
            "The process that tries grammars was killed, probably for want of memory. Try again in "
            "a few seconds.",
            retry_after_s=5,
        )


def _exchange(child: Child, payload: bytes) -> bytes:
    """Send the request and return the answer; looks for a cancellation meanwhile."""
    deadline = time.monotonic() + LIMIT_S
    rest = memoryview(payload)
    while rest:
        # On a busy machine a child of low priority may read nothing for many seconds.
        check_cancelled()
        rest = child.write_until(rest, min(deadline, time.monotonic() + _POLL_S))
        if rest and time.monotonic() >= deadline:
            raise TimeoutError
    while True:
        check_cancelled()
        try:
            return child.read_line(min(deadline, time.monotonic() + _POLL_S))
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise
            _check_memory(child.pid)


def _check_memory(process_id: int) -> None:
    """Raise _OverMemory if the child takes too much: macOS has no limit for it."""
    with contextlib.suppress(psutil.Error):
        if psutil.Process(process_id).memory_info().rss > _MEMORY_LIMIT_BYTES:
            raise _OverMemory


def _used_cpu_s(process_id: int) -> float:
    try:
        used = psutil.Process(process_id).cpu_times()
    except psutil.Error:
        return 0.0
    return used.user + used.system


def _verdict(report: dict[str, float | str]) -> Verdict:
    if report["error"]:
        return Verdict(str(report["error"]))
    grown_bytes = int(report["grown_bytes"])
    if float(report["compile_s"]) > COMPILE_LIMIT_S:
        return Verdict(
            f"compiling it takes {report['compile_s']:.1f} s, and at most {COMPILE_LIMIT_S:g} s "
            "are allowed"
        )
    if float(report["mask_s"]) > MASK_LIMIT_S:
        return Verdict(
            f"one token of the answer takes {report['mask_s']:.2f} s, and at most "
            f"{MASK_LIMIT_S:g} s are allowed"
        )
    if grown_bytes > GROWTH_LIMIT_BYTES:
        return Verdict(
            f"it takes {format_bytes(grown_bytes)}, and at most "
            f"{format_bytes(GROWTH_LIMIT_BYTES)} are allowed"
        )
    return Verdict("", grown_bytes)
