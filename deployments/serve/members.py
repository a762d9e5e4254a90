"""The processes of Ray's own: without some the server must end, others are started again."""

import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from deployments.serve.processes import is_alive

Children = Callable[[], Iterable[psutil.Process]]

# What the command lines or titles contain.  Serve restarts replicas and its controller; nobody
# restarts these, and without one of them no process could be started any more.
_MEMBERS: Mapping[str, str] = {
    "gcs/gcs_server": "Ray's control service (gcs_server)",
    "raylet/raylet": "Ray's node manager (raylet)",
    "ray::DashboardAgent": "Ray's dashboard agent",
    "dashboard/agent.py": "Ray's dashboard agent",
    "ray::RuntimeEnvAgent": "Ray's runtime environment agent",
    "runtime_env/agent/main.py": "Ray's runtime environment agent",
}
_MEMBER_COUNT = len(set(_MEMBERS.values()))
# Requests do not need these.
_HELPERS: Mapping[str, str] = {
    "dashboard/dashboard.py": "Ray's dashboard",
    "_private/log_monitor.py": "Ray's log monitor",
    "_private/monitor.py": "Ray's cluster monitor",
}
_LONGEST_PAUSE_S = 300.0
_FIRST_PAUSE_S = 5.0


class Members:
    """The processes of Ray that nobody restarts; without one of them the server must end."""

    def __init__(self, children: Children) -> None:
        """`children` returns the current process tree of the server."""
        self._children = children
        self._found: dict[str, psutil.Process] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every kind of member has been seen."""
        return len(self._found) == _MEMBER_COUNT

    def look(self) -> None:
        """Look for members that have not been seen yet; does nothing once all are known."""
        if self.is_complete:
            return
        for process in self._children():
            name = _name(process, _MEMBERS)
            if name and name not in self._found:
                self._found[name] = process

    def ended(self) -> str:
        """Return the names of members that have ended, for a sentence; empty while all run."""
        gone = [
            f"{name}, process {process.pid}"
            for name, process in self._found.items()
            if not is_alive(process)
        ]
        return ", ".join(gone)


@dataclass(slots=True)
class _Helper:
    process: psutil.Process
    command: list[str]
    environment: dict[str, str]
    folder: str
    started_at: float
    pause_s: float = _FIRST_PAUSE_S


class Helpers:
    """The processes of Ray that requests do not need: started again with the same command."""

    def __init__(
        self, children: Children, log: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`children` is as for `Members`; output of processes started again is added to `log`."""
        self._clock = clock
        self._children = children
        self._log = log
        self._found: dict[str, _Helper] = {}
        self._started: list[subprocess.Popen[bytes]] = []

    def look(self) -> None:
        """Look for helpers that have not been seen yet."""
        if len(self._found) == len(_HELPERS):
            return
        for process in self._children():
            name = _name(process, _HELPERS)
            if name and name not in self._found:
                with suppress(psutil.Error, OSError):
                    self._found[name] = _Helper(
                        process,
                        process.cmdline(),
                        process.environ(),
                        process.cwd(),
                        self._clock(),
                    )

    def restart(self) -> list[str]:
        """Start what has ended; return its names.  Waits longer after each failure in a row."""
        for process in self._started:
            process.poll()
        return [name for name, helper in self._found.items() if self._restart(helper)]

    def close(self) -> None:
        """Kill the processes that were started again, and reap them."""
        for process in self._started:
            process.kill()
            process.wait()

    def _restart(self, helper: _Helper) -> bool:
        age_s = self._clock() - helper.started_at
        if is_alive(helper.process):
            if age_s > _LONGEST_PAUSE_S:
                helper.pause_s = _FIRST_PAUSE_S
            return False
        if age_s < helper.pause_s:
            return False
        helper.pause_s = min(2 * helper.pause_s, _LONGEST_PAUSE_S)
        helper.started_at = self._clock()
        try:
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    helper.command,
                    cwd=helper.folder,
                    env=helper.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._started.append(process)
            helper.process = psutil.Process(process.pid)
        except (OSError, psutil.Error):
            return False
        return True


def _name(process: psutil.Process, names: Mapping[str, str]) -> str:
    try:
        # Only the beginning: the raylet's own arguments contain the agents' command lines.
        words = " ".join(process.cmdline()[:4])
    except (psutil.Error, OSError):
        return ""
    return next((name for mark, name in names.items() if mark in words), "")
