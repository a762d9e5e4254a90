"""Inspection of model files in a process of its own: the gate before any engine."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catalog.encoding import info_from_json
from catalog.scan.identify import Outcome, Refused, Unknown

FILE_LIMIT_S = 60.0
START_LIMIT_S = 60.0
# What the outcome of a file is called whose format is not known because its inspection died.
UNKNOWN_FORMAT = "unknown"

_READ_BYTES = 65536
_MOST_ANSWER_BYTES = 32 * 1024**2
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "SYSTEMROOT")
# Source: sandbox-exec(1) of macOS.
_MAC_SANDBOX = "(version 1)(allow default)(deny network*)(deny file-write*)"


class Inspector:
    """Asks a limited child process what files are; one thread at a time.

    The child starts with the first file, and anew after one that it did not survive.
    """

    def __init__(
        self,
        formats: Sequence[str],
        *,
        command: Sequence[str] | None = None,
        file_limit_s: float = FILE_LIMIT_S,
    ) -> None:
        self._command = list(command) if command is not None else _command(formats)
        self._file_limit_s = file_limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def examine(self, path: Path) -> Outcome:
        """Return what `path` is; blocks for as long as that takes, 60 s at most.

        A file that its inspection does not survive is refused, with what was being read.
        """
        request = json.dumps({"path": str(path)}).encode() + b"\n"
        stage = ""
        limit_s = self._file_limit_s + (START_LIMIT_S if self._process is None else 0.0)
        deadline = time.monotonic() + limit_s
        try:
            self._write(request)
            while True:
                answer = json.loads(self._line(deadline))
                if "stage" not in answer:
                    return _outcome(answer)
                stage = str(answer["stage"])
        except TimeoutError:
            self._end()
            return _refused(path, stage, f"took more than {self._file_limit_s:g} s")
        except (EOFError, BrokenPipeError):
            return _refused(path, stage, self._cause())
        except (ValueError, KeyError, TypeError):
            self._end()
            return _refused(path, stage, "gave no sense")

    def close(self) -> None:
        """End the child; twice is fine."""
        self._end()

    def _write(self, request: bytes) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
            self._pending = b""
        assert self._process.stdin is not None
        self._process.stdin.write(request)
        self._process.stdin.flush()

    def _line(self, deadline: float) -> bytes:
        """Return the child's next line.  Raises TimeoutError, EOFError."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            data = os.read(descriptor, _READ_BYTES)
            if not data:
                raise EOFError
            self._pending += data
            if len(self._pending) > _MOST_ANSWER_BYTES:
                raise ValueError("the answer is too long")
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _cause(self) -> str:
        """Return how the child died, and forget it."""
        assert self._process is not None
        process = self._process
        self._end()
        code = process.returncode
        if code == -signal.SIGXCPU:
            return "took too much processor time"
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with code {code}"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            # A child that is dying already keeps its own cause of death.
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass


def _command(formats: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "catalog.scan.inspector_child", *formats]
    if sys.platform == "darwin":
        return ["sandbox-exec", "-p", _MAC_SANDBOX, *command]
    return command


def _environment() -> dict[str, str]:
    """Return an environment without keys or proxies, and with one thread for every library."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {
        **kept,
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
    if "refused" in answer:
        return Refused(str(answer["format"]), str(answer["refused"]))
    return Unknown(tuple(map(str, answer["unknown"])))


def _refused(path: Path, stage: str, cause: str) -> Refused:
    what = stage or "starting the inspection"
    return Refused(UNKNOWN_FORMAT, f"The file {path.name!r} is not used: {what} {cause}.")
