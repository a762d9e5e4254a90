"""Inspects model files in a limited child process, before any engine opens them."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from catalog.encoding import info_from_json
from catalog.scan.identify import Outcome, Refused, Uninspected, Unknown
from catalog.scan.inspector_child import MEMORY_BYTES, WITHOUT
from catalog.scan.packages import natural_format
from core.child import (
    AnswerTooLong,
    Child,
    ChildEnded,
    ChildTookMemory,
    describe_exit,
    kept_environment,
)
from core.units import MIB, format_bytes

logger = logging.getLogger(__name__)

FILE_LIMIT_S = 60.0
START_LIMIT_S = 60.0
# The check of a model by its runtimes may take this many times the limit of a file.
_RUNTIME_FACTOR = 4.0
# The format of a refused file whose inspection failed and whose name promises no format.
UNKNOWN_FORMAT = "unknown"

_ANSWER_LIMIT_BYTES = 32 * MIB
# Time for a dying child to exit by itself, so that its exit status shows the cause.
_DYING_S = 0.2
# Signals that the content of a file causes, as it causes exits with a code.
_CRASHES = (
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGSYS,
    signal.SIGXCPU,
)
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "SYSTEMROOT")
# Source: sandbox-exec(1) of macOS.
_MAC_SANDBOX = "(version 1)(allow default)(deny network*)(deny file-write*)"
# sandbox-exec's exit code where it cannot apply the profile, for example inside another sandbox:
# profiles do not nest.  Source: EX_OSERR of sysexits.h, which sandbox-exec(1) exits with.
_NOT_SANDBOXED = 71
_SELF_TEST_S = 10.0


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the child is doing: the check's name, and the runtime whose code it runs, if any.

    `is_start`: the runtime is being started, for all files.
    """

    name: str = ""
    runtime: str = ""
    is_start: bool = False


class Inspector:
    """Identifies files in a limited child process; one thread at a time.

    The child starts with the first file, and again after a file that crashed it.
    """

    def __init__(
        self,
        formats: Sequence[str],
        *,
        command: Sequence[str] | None = None,
        file_limit_s: float = FILE_LIMIT_S,
    ) -> None:
        self._command = list(command) if command is not None else _command(formats)
        # What the command is run by; empty once that could not start.
        self._sandbox = _sandbox()
        self._file_limit_s = file_limit_s
        self._child: Child | None = None
        self._stage = _Stage()
        # Runtimes whose start ended a child: the next ones do without.
        self._without: set[str] = set()

    def examine(self, path: Path) -> Outcome:
        """Return what `path` is; blocks up to 60 s, plus 60 s when the child has to start.

        The check of a model by its runtimes may take 180 s more, on a machine that is busy.

        A file whose checks crash the child twice, the second time one of its own, is refused,
        naming the check.  A child that does not start, is killed, hangs or sends nonsense says
        nothing about the file: it is uninspected.
        """
        is_fresh = self._child is None
        avoid: list[str] = []
        outcome, is_crash = self._ask(path)
        while is_crash and self._stage.runtime and self._stage.runtime not in avoid:
            # The runtime's code ended the child, or took too long: another one may run the model.
            avoid.append(self._stage.runtime)
            is_fresh = True
            outcome, is_crash = self._ask(path, avoid)
        took_memory = isinstance(outcome, Refused) and outcome.took_memory
        if (is_crash or took_memory) and not is_fresh:
            # Files before it may have damaged the child, or left no memory.
            self.close()
            outcome, is_crash = self._ask(path)
        if isinstance(outcome, Refused) and outcome.took_memory:
            return self._judged(path, outcome)
        return outcome

    @staticmethod
    def _judged(path: Path, outcome: Refused) -> Outcome:
        """Return the verdict on a file that took too much memory, if the machine had enough."""
        try:
            free_bytes = psutil.virtual_memory().available
        except (psutil.Error, OSError, RuntimeError):
            # A psutil that is older than the system, as on macOS 27.
            return outcome
        if free_bytes >= MEMORY_BYTES:
            return outcome
        return Uninspected(
            f"the inspection of {path.name!r} got no memory: {format_bytes(free_bytes)} are free"
        )

    def _ask(self, path: Path, avoid: Sequence[str] = ()) -> tuple[Outcome, bool]:
        """Ask the child once; return the outcome, and whether a check crashed the child.

        Notes the runtime whose code ran last.
        """
        request = json.dumps({"path": str(path), "avoid": list(avoid)}).encode() + b"\n"
        self._stage = _Stage()
        start_s = START_LIMIT_S if self._child is None else 0.0
        try:
            child = self._running_child()
        except (OSError, RuntimeError) as problem:
            if self._sandbox and isinstance(problem, FileNotFoundError):
                return self._ask_unsandboxed(path, avoid, "sandbox-exec was not found")
            cause = getattr(problem, "strerror", None) or problem
            return Uninspected(f"the process that inspects files did not start ({cause})"), False
        try:
            return _outcome(self._answer(child, request, start_s)), False
        except TimeoutError:
            self.close()
            return _uninspected(
                path, self._stage.name, f"took longer than {self._limit_s:g} s"
            ), False
        except ChildTookMemory:
            self.close()
            return self._over_memory(path), False
        except ChildEnded:
            self._child = None
            code = child.close(grace_s=_DYING_S)
            if self._sandbox and code == _NOT_SANDBOXED and not self._stage.name:
                return self._ask_unsandboxed(path, avoid, describe_exit(code))
            return self._ended(path, code)
        except (AnswerTooLong, ValueError, KeyError, TypeError):
            self.close()
            cause = "sent a reply that could not be read"
            return _uninspected(path, self._stage.name, cause), False
        except OSError as problem:
            self.close()
            cause = f"could not be followed ({problem.strerror})"
            return _uninspected(path, self._stage.name, cause), False

    def _ask_unsandboxed(
        self, path: Path, avoid: Sequence[str], cause: str
    ) -> tuple[Outcome, bool]:
        """Ask a child that starts without sandbox-exec; it keeps its resource limits."""
        self._sandbox = []
        _warn_of_no_sandbox(cause)
        return self._ask(path, avoid)

    @property
    def _limit_s(self) -> float:
        """The time for one file; its check by runtimes gives way to all that computes answers."""
        return self._file_limit_s * (_RUNTIME_FACTOR if self._stage.runtime else 1.0)

    def _answer(self, child: Child, request: bytes, start_s: float) -> dict[str, Any]:
        """Send a request and return the answer, noting each stage before it."""
        started = time.monotonic()
        child.write(request, started + start_s + self._limit_s)
        while True:
            line = json.loads(child.read_line(started + start_s + self._limit_s))
            answer: dict[str, Any] = line
            if "stage" not in answer:
                return answer
            self._stage = _Stage(
                str(answer["stage"]), str(answer.get("runtime", "")), bool(answer.get("start"))
            )

    def _over_memory(self, path: Path) -> Outcome:
        """Return the outcome of a child that was killed for the memory it held."""
        if not self._stage.name or self._stage.is_start:
            return _uninspected(path, self._stage.name, "took too much memory")
        format = natural_format(path) or UNKNOWN_FORMAT
        return Refused(format, "its inspection took too much memory", took_memory=True)

    def _ended(self, path: Path, code: int) -> tuple[Outcome, bool]:
        """Return the outcome of a child that ended itself with `code`."""
        stage = self._stage
        if stage.is_start:
            self._without.add(stage.runtime)
        if stage.name and (code > 0 or -code in _CRASHES):
            return _refused(path, stage.name, describe_exit(code)), True
        return _uninspected(path, stage.name, describe_exit(code)), False

    def close(self) -> None:
        """Kill the child; may be called twice."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _running_child(self) -> Child:
        if self._child is None:
            without = [WITHOUT + name for name in sorted(self._without)]
            self._child = Child(
                [*self._sandbox, *self._command, *without],
                _environment(),
                answer_limit_bytes=_ANSWER_LIMIT_BYTES,
                memory_limit_bytes=MEMORY_BYTES,
            )
        return self._child


def _command(formats: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "catalog.scan.inspector_child", *formats]


def _sandbox() -> list[str]:
    """Return what cuts a child off from the network on macOS; on Linux it does so itself.

    Blocks for the self-test the first time in this process: for milliseconds, at most 10 s.
    """
    if sys.platform != "darwin":
        return []
    if cause := _sandbox_problem():
        _warn_of_no_sandbox(cause)
        return []
    return ["sandbox-exec", "-p", _MAC_SANDBOX]


@cache
def _sandbox_problem() -> str:
    """Return why sandbox-exec cannot start programs here; empty if it can, or if that is unclear.

    Tried once in this process, before its first scan.
    """
    command = ["sandbox-exec", "-p", _MAC_SANDBOX, "/usr/bin/true"]
    try:
        code = subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SELF_TEST_S,
            check=False,
        ).returncode
    except FileNotFoundError:
        return "sandbox-exec was not found"
    except subprocess.TimeoutExpired:
        return f"it took longer than {_SELF_TEST_S:g} s"
    except (OSError, RuntimeError):
        # The system is short of something: that says nothing about sandbox-exec.
        return ""
    # A signal comes from outside, and may not come again.
    return describe_exit(code) if code > 0 else ""


@cache
def _warn_of_no_sandbox(cause: str) -> None:
    """Log once in this process that files are inspected without sandbox-exec."""
    logger.warning(
        "Model files are inspected without sandbox-exec, which did not start (%s): the server "
        "probably runs inside another sandbox, such as an agent's. The inspection still cannot "
        "write files or start processes, but its network is open; start the server from a "
        "terminal to close it.",
        cause,
    )


def _environment() -> dict[str, str]:
    """Return an environment without secrets or proxies; libraries use one thread."""
    return {
        **kept_environment(*_KEPT_VARIABLES),
        "HOME": os.devnull,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _outcome(answer: dict[str, Any]) -> Outcome:
    if "info" in answer:
        return info_from_json(answer["info"])
    if "uninspected" in answer:
        return Uninspected(str(answer["uninspected"]))
    if "refused" in answer:
        return Refused(
            str(answer["format"]),
            str(answer["refused"]),
            took_memory=bool(answer.get("memory", False)),
            is_guess=bool(answer.get("guess", False)),
        )
    return Unknown(tuple(map(str, answer["unknown"])))


def _refused(path: Path, stage: str, cause: str) -> Refused:
    format = natural_format(path) or UNKNOWN_FORMAT
    return Refused(format, f"The file {path.name!r} was skipped: {stage} {cause}.")


def _uninspected(path: Path, stage: str, cause: str) -> Uninspected:
    what = stage or "the start of the inspection"
    return Uninspected(f"the inspection of {path.name!r} failed: {what} {cause}")
