"""The inspector's child process: inspects model files on request, under resource limits.

Protocol, in JSON lines: a request is `{"path": …}`.  The reply is a `{"stage": …}` line before
each check, then one `{"info": …}`, `{"format": …, "refused": …}`, `{"unknown": […]}` or
`{"uninspected": …}`.  The
process exits at the end of stdin.
"""

import ctypes
import ctypes.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

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
from core.errors import BrokenModel
from core.units import GIB

MEMORY_BYTES = 2 * GIB
CPU_S = 20
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

    def __init__(self, backends: Sequence[Backend], out: IO[str]) -> None:
        self._backends = backends
        self._out = out

    def answer(self, path: Path) -> None:
        """Inspect one file and send the reply."""
        self._send_stage("its identification")
        outcome = examine(path, self._backends)
        if isinstance(outcome, ModelInfo):
            outcome = self._check_files(outcome)
        self._send(_reply(outcome))

    def _check_files(self, info: ModelInfo) -> Outcome:
        try:
            check_files(info, self._send_stage)
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

    backends = list(backends_for(sys.argv[1:]).values())
    out = take_stdout()
    limit_inspection()
    child = InspectionServer(backends, out)
    for line in sys.stdin:
        limit_cpu(CPU_S)
        child.answer(Path(json.loads(line)["path"]))


if __name__ == "__main__":
    main()
