"""Inspection of model files in a process of its own: the gate before any engine."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catalog.encoding import info_from_json
from catalog.scan.identify import Outcome, Refused, Unknown
from core.child import AnswerTooLong, Child, ChildEnded, describe_exit, kept_environment
from core.units import MIB

FILE_LIMIT_S = 60.0
START_LIMIT_S = 60.0
# What the outcome of a file is called whose format is not known because its inspection died.
UNKNOWN_FORMAT = "unknown"

_ANSWER_LIMIT_BYTES = 32 * MIB
# How long a child that stopped answering may take to die of its own cause.
_DYING_S = 0.2
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
        self._child: Child | None = None

    def examine(self, path: Path) -> Outcome:
        """Return what `path` is; blocks for as long as that takes, 60 s at most.

        A file that its inspection does not survive is refused, with what was being read.
        """
        request = json.dumps({"path": str(path)}).encode() + b"\n"
        stage = ""
        limit_s = self._file_limit_s + (START_LIMIT_S if self._child is None else 0.0)
        deadline = time.monotonic() + limit_s
        child = self._started()
        try:
            child.write(request, deadline)
            while True:
                answer = json.loads(child.read_line(deadline))
                if "stage" not in answer:
                    return _outcome(answer)
                stage = str(answer["stage"])
        except TimeoutError:
            self.close()
            return _refused(path, stage, f"took more than {self._file_limit_s:g} s")
        except ChildEnded:
            self._child = None
            return _refused(path, stage, describe_exit(child.close(grace_s=_DYING_S)))
        except (AnswerTooLong, ValueError, KeyError, TypeError):
            self.close()
            return _refused(path, stage, "gave no sense")

    def close(self) -> None:
        """End the child; twice is fine."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _started(self) -> Child:
        if self._child is None:
            self._child = Child(
                self._command, _environment(), answer_limit_bytes=_ANSWER_LIMIT_BYTES
            )
        return self._child


def _command(formats: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "catalog.scan.inspector_child", *formats]
    if sys.platform == "darwin":
        return ["sandbox-exec", "-p", _MAC_SANDBOX, *command]
    return command


def _environment() -> dict[str, str]:
    """Return an environment without keys or proxies, and with one thread for every library."""
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
    if "refused" in answer:
        return Refused(str(answer["format"]), str(answer["refused"]))
    return Unknown(tuple(map(str, answer["unknown"])))


def _refused(path: Path, stage: str, cause: str) -> Refused:
    what = stage or "starting the inspection"
    return Refused(UNKNOWN_FORMAT, f"The file {path.name!r} is not used: {what} {cause}.")
