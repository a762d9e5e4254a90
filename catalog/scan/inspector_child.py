"""The inspector's child process: inspects model files on request, under resource limits.

Protocol, in JSON lines: a request is `{"path": …, "avoid": [runtimes]}`.  The reply is a
`{"stage": …}` line before each check, with `"runtime"` for one that runs a runtime's code, then one
`{"info": …}`, `{"format": …, "refused": …}`, `{"unknown": […]}` or `{"uninspected": …}`.  The
process exits at the end of stdin.
"""

import ctypes
import ctypes.util
import json
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from backends.abilities import RuntimeChecked
from backends.base import Backend, ModelInfo
from backends.registry import backends_for
from catalog.encoding import info_to_json
from catalog.scan.identify import (
    Outcome,
    Refused,
    Uninspected,
    Unknown,
    examine,
    passing_reason,
)
from catalog.scan.inspector_checks import check_files
from core.child import give_way, limit_cpu, limit_process, take_stdout
from core.errors import BrokenModel, Unavailable
from core.units import GIB

MEMORY_BYTES = 2 * GIB
CPU_S = 20
# Before the name of a runtime, as an argument of the process.
WITHOUT = "--without="
_NEW_USER_AND_NETWORK = 0x10000000 | 0x40000000


def limit_inspection() -> None:
    """Limit memory, forbid written files and new processes, and cut off the network if possible.

    Private memory is limited rather than address space, because weights of any size are mapped.
    """
    limit_process(data_bytes=MEMORY_BYTES, file_bytes=0, processes=0)
    if sys.platform == "linux":
        # Source: unshare(2); where the system forbids it to users the network stays reachable.
        ctypes.CDLL(ctypes.util.find_library("c")).unshare(_NEW_USER_AND_NETWORK)


class InspectionServer:
    """Answers inspection requests one after the other."""

    def __init__(
        self, backends: Sequence[Backend], out: IO[str], without: Sequence[str] = ()
    ) -> None:
        """`without` are runtimes whose start ended an earlier process."""
        self._backends = backends
        self._out = out
        self._without = tuple(without)

    def start_checks(self) -> None:
        """Start what checks of runtimes need; a runtime that ends the process is told before."""
        for backend in self._backends:
            if not isinstance(backend, RuntimeChecked):
                continue
            try:
                backend.start_checks(self._without, partial(self._send_runtime, is_start=True))
            except (Exception, SystemExit) as problem:
                # The first check says it of each model.
                sys.stderr.write(f"{backend.name}: {problem!r}\n")

    def answer(self, path: Path, avoid: Collection[str] = ()) -> None:
        """Inspect one file and send the reply; runtimes in `avoid` are not checked."""
        self._send_stage("its identification")
        outcome = examine(path, self._backends)
        if isinstance(outcome, ModelInfo):
            outcome = self._check_files(outcome, avoid)
        self._send(_reply(outcome))

    def _check_files(self, info: ModelInfo, avoid: Collection[str]) -> Outcome:
        try:
            check_files(info, self._send_stage)
            backend = next(each for each in self._backends if each.name == info.format)
            if isinstance(backend, RuntimeChecked):
                return backend.check_runtimes(info, (*avoid, *self._without), self._send_runtime)
        except Unavailable as problem:
            return Uninspected(problem.message)
        except BrokenModel as problem:
            failure = passing_reason(problem)
            return _unread(failure) if failure else Refused(info.format, problem.message)
        except MemoryError:
            return Refused(info.format, "its inspection took too much memory", took_memory=True)
        except Exception as problem:
            if failure := passing_reason(problem):
                return _unread(failure)
            return Refused(info.format, f"its inspection failed: {type(problem).__name__}")
        return info

    def _send_runtime(self, name: str, *, is_start: bool = False) -> None:
        self._send({"stage": f"its check by {name}", "runtime": name, "start": is_start})

    def _send_stage(self, name: str) -> None:
        self._send({"stage": name})

    def _send(self, answer: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


def _unread(failure: str) -> Uninspected:
    return Uninspected(f"it could not be read ({failure})")


def _reply(outcome: Outcome) -> Mapping[str, Any]:
    match outcome:
        case ModelInfo() as info:
            return {"info": info_to_json(info)}
        case Refused(format, reason, took_memory, is_guess):
            return {
                "format": format,
                "refused": reason[:2000],
                "memory": took_memory,
                "guess": is_guess,
            }
        case Unknown(reasons):
            return {"unknown": [reason[:500] for reason in reasons]}
        case Uninspected(reason):
            return {"uninspected": reason[:500]}


def main() -> None:
    """Import the backends, apply the limits, and answer requests until stdin ends."""
    give_way()
    import tokenizers as _  # noqa: F401 - before the limits, which forbid new threads

    formats = [name for name in sys.argv[1:] if not name.startswith(WITHOUT)]
    without = [name.removeprefix(WITHOUT) for name in sys.argv[1:] if name.startswith(WITHOUT)]
    backends = list(backends_for(formats).values())
    child = InspectionServer(backends, take_stdout(), without)
    # Libraries ask for this folder when they are imported, and would test whether it is writable.
    tempfile.tempdir = os.sep
    child.start_checks()
    limit_inspection()
    for line in sys.stdin:
        limit_cpu(CPU_S)
        request = json.loads(line)
        child.answer(Path(request["path"]), request.get("avoid", ()))


if __name__ == "__main__":
    main()
