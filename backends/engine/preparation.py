"""Threads that prepare requests: in order, without letting a slow one delay the others."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from backends.cancellation import Cancelled, cancelled_by
from backends.engine.threads import name_this_thread
from backends.watch import StepWatch
from core.errors import EngineFailed, RequestError, is_panic

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A job that lasts longer is in native code or a child process, so another one may run beside it.
PATIENCE_S = 0.1
MAX_RUNNING = 16
_IDLE_S = 10.0


class Job(Generic[Result]):
    """Work for one request; `cancel` skips it, or lets it stop at its next check."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self.done: Future[Result] = Future()
        self.cancelled = threading.Event()
        self._work = work

    def cancel(self) -> None:
        """Nobody waits for the result any more.  Thread-safe."""
        self.cancelled.set()
        self.done.cancel()

    def run(self) -> None:
        """Do the work and set the result; never raises."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            with cancelled_by(self.cancelled):
                result = self._work()
        except Cancelled:
            self.done.set_exception(EngineFailed("The request was cancelled."))
        except RecursionError:
            self.done.set_exception(RequestError("The request is nested too deeply."))
        except BaseException as problem:
            if not is_panic(problem):
                self.done.set_exception(problem)
                return
            logger.exception("a library failed while a request was prepared")
            self.done.set_exception(
                RequestError(
                    "The request cannot be prepared: a library failed on its text or schema "
                    f"({type(problem).__name__}). Change them; the server's log has the details."
                )
            )
        else:
            self.done.set_result(result)


class PreparationThreads:
    """Runs jobs in the order of their submission, usually one at a time.

    A job starts as soon as none of the running ones is younger than 0.1 s: short ones run one
    after the other, and a slow one delays those behind it by 0.1 s.  At most 16 run at once.
    """

    def __init__(self, watch: StepWatch) -> None:
        """`watch` measures each job."""
        self._watch = watch
        self._changed = threading.Condition()
        self._queue: deque[Job[Any]] = deque()
        self._running: dict[Job[Any], float] = {}
        self._idle = 0
        self._threads: set[threading.Thread] = set()
        self._is_closing = False

    def submit(self, work: Callable[[], Result]) -> Job[Result]:
        """Queue a job.  Raises EngineFailed after `close`."""
        job = Job(work)
        with self._changed:
            if self._is_closing:
                raise EngineFailed("The model is being unloaded.")
            self._queue.append(job)
            self._ensure_idle_thread()
            self._changed.notify()
        return job

    def close(self) -> None:
        """Skip the queued jobs, stop the running ones and wait for them; idempotent."""
        with self._changed:
            self._is_closing = True
            left = list(self._queue)
            self._queue.clear()
            for job in self._running:
                job.cancelled.set()
            threads = list(self._threads)
            self._changed.notify_all()
        for job in left:
            if job.done.set_running_or_notify_cancel():
                job.done.set_exception(EngineFailed("The model is being unloaded."))
        for thread in threads:
            thread.join()

    def _ensure_idle_thread(self) -> None:
        """Start a thread that waits until the first queued job may run."""
        if not self._queue or self._idle or len(self._threads) > MAX_RUNNING:
            return
        thread = threading.Thread(target=self._serve, name="impetus-prepare", daemon=True)
        self._threads.add(thread)
        self._idle += 1
        try:
            thread.start()
        except RuntimeError:
            self._idle -= 1
            self._threads.discard(thread)
            # Without any thread the job would wait for ever.
            if not self._threads:
                self._queue.pop().done.set_exception(
                    EngineFailed("No thread could be started to prepare the request. Try again.")
                )

    def _serve(self) -> None:
        name_this_thread("impetus-prepare")
        while (job := self._next()) is not None:
            with self._watch.running("prepare"):
                job.run()
            with self._changed:
                del self._running[job]
                self._idle += 1
                self._changed.notify()

    def _next(self) -> Job[Any] | None:
        """Wait for a job that may start; None when closing, or after some idle time."""
        with self._changed:
            idle_since = time.monotonic()
            while True:
                if self._is_closing:
                    break
                now = time.monotonic()
                if self._queue and (wait_s := self._wait_s(now)) <= 0:
                    job = self._queue.popleft()
                    self._idle -= 1
                    self._running[job] = now
                    self._ensure_idle_thread()
                    return job
                if not self._queue:
                    wait_s = idle_since + _IDLE_S - now
                    if wait_s <= 0:
                        break
                self._changed.wait(wait_s)
            self._idle -= 1
            self._threads.discard(threading.current_thread())
            return None

    def _wait_s(self, now: float) -> float:
        """Return the seconds until the next job may start."""
        if len(self._running) >= MAX_RUNNING:
            return _IDLE_S
        youngest = max(self._running.values(), default=now - PATIENCE_S)
        return youngest + PATIENCE_S - now
