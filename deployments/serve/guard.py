"""Guards a server from outside: a small process that ends the others when the main one dies.

`python -m deployments.serve.guard ROOT SERVER_ID KIND`; ROOT is the process id of `serve run`.  If
KIND is `owned`, standard input is a pipe from the launcher, whose end means that it died.  If it is
`by_hand`, the guard also ends the server, with a message, when a part dies that nobody restarts.
"""

import itertools
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from core.child import SERVER_ID
from deployments.serve.members import Members
from deployments.serve.processes import (
    descendants,
    end_processes,
    is_alive,
    new_server_id,
    processes_of,
    remember,
    wait_for_ends,
)

_ROOT_FOLDER = Path(__file__).resolve().parents[2]
_MODULE = "deployments.serve.guard"
_POLL_S = 1.0
_ROUNDS_BETWEEN_SCANS = 5
_STARTING_ROUNDS = 30
# How long the rest may need after an ordinary end of the main process.
_AFTER_ROOT_S = 5.0
_GRACE_S = 3.0
_ROUNDS = 3


def start_guard(root: int, server_id: str, *, owned: bool = False) -> subprocess.Popen[bytes]:
    """Start a guard for the process `root`; if `owned`, keep its `stdin` open.

    The guard is in a session of its own: neither Ctrl-C nor Ray's reaper reaches it.
    """
    kind = "owned" if owned else "by_hand"
    environment = {name: value for name, value in os.environ.items() if name != SERVER_ID}
    return subprocess.Popen(
        [sys.executable, "-m", _MODULE, str(root), server_id, kind],
        cwd=_ROOT_FOLDER,
        env=environment,
        stdin=subprocess.PIPE if owned else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def guard_unguarded() -> None:
    """Start a guard for the `serve run` whose Ray cluster this process belongs to, if it has none.

    Called where `serve run` did not run `deployments.start.driver`.  Does nothing in a cluster that
    `ray start` made, which has no such process.
    """
    if SERVER_ID in os.environ:
        return
    try:
        raylet = psutil.Process(os.getppid())
        driver = raylet.parent()
        if driver is None or "raylet" not in raylet.name() or not _is_serve_run(driver):
            return
        command = ["-m", _MODULE, str(driver.pid)]
        if not any(_has_words(process, command) for process in psutil.process_iter()):
            start_guard(driver.pid, new_server_id(driver.pid))
    except (psutil.Error, OSError):
        return


def _is_serve_run(process: psutil.Process) -> bool:
    words = process.cmdline()
    return "run" in words and any(Path(word).name == "serve" for word in words[:3])


def _has_words(process: psutil.Process, words: list[str]) -> bool:
    with suppress(psutil.Error, OSError):
        command = process.cmdline()
        return command[1 : 1 + len(words)] == words
    return False


def main(root: int, server_id: str, *, is_owned: bool) -> int:
    """Wait for the end of the server, then end its processes.  Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        process = psutil.Process(root)
    except psutil.NoSuchProcess:
        return _end(server_id, [])
    known: dict[int, psutil.Process] = {}

    def children() -> list[psutil.Process]:
        found = descendants(process)
        remember(known, found)
        return found

    owner = 0 if is_owned else None
    cause = _watch(process, Members(known.values), children, owner=owner)
    if cause:
        _say(f"{cause} ended; the server cannot continue without it and stops. Start it again.")
    if cause or is_owned:
        children()
        return _end(server_id, [process, *known.values()])
    wait_for_ends(known.values(), _AFTER_ROOT_S)
    return _end(server_id, list(known.values()))


def _watch(
    process: psutil.Process,
    members: Members,
    scan: Callable[[], object],
    *,
    owner: int | None = None,
) -> str:
    """Block until the server or its owner has ended; return the name of a member that did.

    `scan` is called every few seconds to record the process tree: Ray's titles overwrite the
    environment by which a process could be found later.  `owner` is a pipe from the owner.
    """
    poll = select.poll()
    if owner is not None:
        poll.register(owner, select.POLLIN)
    for number in itertools.count():
        if not is_alive(process) or poll.poll(_POLL_S * 1000):
            return ""
        if number % _ROUNDS_BETWEEN_SCANS == 0 or number < _STARTING_ROUNDS:
            scan()
        if owner is None:
            members.look()
            # At an ordinary stop they end shortly before the main process.
            if members.ended() and _outlives(process, members):
                return members.ended()
    return ""


def _outlives(process: psutil.Process, members: Members) -> bool:
    """Return whether the main process still runs a while after a member ended."""
    return bool(wait_for_ends([process], _AFTER_ROOT_S)) and bool(members.ended())


def _end(server_id: str, known: list[psutil.Process]) -> int:
    """End the known processes and all that carry the server's id, until none is left."""
    for _ in range(_ROUNDS):
        found = {process.pid: process for process in (*known, *processes_of(server_id))}
        left = [one for one in found.values() if one.pid != os.getpid() and is_alive(one)]
        if not left:
            return 0
        end_processes(left, _GRACE_S)
    return 1


def _say(line: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"impetus: {line}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], is_owned=sys.argv[3] == "owned"))
