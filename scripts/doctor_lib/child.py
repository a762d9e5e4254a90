"""Runs commands as children with a time limit; nothing that they start outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TypeVar

MISSING, TOO_LATE = 127, 124
_HEAD_BYTES, _MOST_BYTES = 8_192, 73_728
_TAIL_CHARACTERS = 4_000
_PAUSE_S = 0.02
_Result = TypeVar("_Result")
_lock = threading.Lock()
_running: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Ran:
    """How a command ended: `code` as a shell gives it, below 0 for a signal; both outputs."""

    code: int
    text: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line of the output, or an empty string."""
        return (self.text.splitlines() or [""])[-1].strip()

    @property
    def tail(self) -> str:
        """The last lines of the output, for the report."""
        return self.text[-_TAIL_CHARACTERS:]

    @property
    def ended(self) -> str:
        """How it ended, in words; empty if it succeeded."""
        if self.code == 0:
            return ""
        if self.code == TOO_LATE:
            return f"did not end within {self.seconds:.0f} s"
        if self.code == MISSING:
            return "was not found"
        if self.code < 0:
            with suppress(ValueError):
                return f"crashed with {signal.Signals(-self.code).name}"
            return f"was ended by signal {-self.code}"
        return f"ended with code {self.code}"


def run(
    command: Sequence[str],
    limit_s: float,
    environment: Mapping[str, str],
    folder: str | None = None,
    most_bytes: int = _MOST_BYTES,
) -> Ran:
    """Run `command` without input; blocks for at most `limit_s` seconds and a little.

    It runs in a process group of its own, all of which is killed at the end.  Output over
    `most_bytes` is cut in the middle.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
        except OSError as problem:
            return Ran(MISSING, problem.strerror or str(problem), 0.0)
        with _lock:
            _running.add(process)
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = TOO_LATE
        finally:
            end_group(process)
            with _lock:
                _running.discard(process)
        return Ran(code, _text(output, most_bytes), time.monotonic() - began)


def in_order(tasks: Sequence[Callable[[], _Result]], lanes: int) -> Generator[_Result, None, None]:
    """Yield the results of `tasks`, of which at most `lanes` run at a time.

    Ends the commands of those that still run if it is closed or interrupted.
    """
    pool = ThreadPoolExecutor(lanes)
    futures = [pool.submit(task) for task in tasks]
    try:
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            with _lock:
                processes = list(_running)
            for process in processes:
                end_group(process)
            time.sleep(_PAUSE_S)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the group that `process` leads, and wait for `process`."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(output: IO[bytes], most_bytes: int) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(0)
    if size <= most_bytes:
        data = output.read()
    else:
        data = output.read(_HEAD_BYTES) + b"\n[...]\n"
        output.seek(size - most_bytes + _HEAD_BYTES)
        data += output.read()
    return data.decode("utf-8", "replace").strip()
