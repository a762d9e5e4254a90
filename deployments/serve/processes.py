"""Finds and ends the processes of one server, also those that have lost their parent."""

import os
import secrets
import signal
import time
from collections.abc import Iterable, Iterator, Sequence

import psutil

from core.child import SERVER_ID

_KILL_LIMIT_S = 5.0
_POLL_S = 0.05


def new_server_id(owner: int) -> str:
    """Return a value for SERVER_ID; `owner` is the process without which the server must end."""
    return f"{owner}-{secrets.token_hex(8)}"


def owner_of(server_id: str) -> int:
    """Return the owner's process id; 0 if the value is not a server's."""
    owner = server_id.partition("-")[0]
    return int(owner) if owner.isdecimal() else 0


def has_owner(process: psutil.Process, server_id: str) -> bool:
    """Return whether the owner of this process' server still runs."""
    try:
        # A younger process has got the id of the owner, which has ended.
        return psutil.Process(owner_of(server_id)).create_time() <= process.create_time()
    except psutil.Error:
        return False


def own_processes() -> Iterator[tuple[psutil.Process, str]]:
    """Yield this user's other processes that belong to a server, with the server's id.

    Those of other containers are left out: their owners cannot be seen from here.
    Those with a title of Ray's are missing, as the title overwrites their environment.
    Reads the environment of every process of this user, about 50 µs each.
    """
    own_namespace = _pid_namespace(os.getpid())
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.uids().effective != os.geteuid():
                continue
            if _pid_namespace(process.pid) != own_namespace:
                continue
            server_id = process.environ().get(SERVER_ID, "")
        except (psutil.Error, OSError):
            continue
        if server_id:
            yield process, server_id


def _pid_namespace(pid: int) -> int:
    """Return the number of the process' pid namespace; 0 where there is none, as on macOS.

    Raises OSError if a process cannot be asked.
    """
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except FileNotFoundError:
        return 0


def processes_of(server_id: str) -> list[psutil.Process]:
    """Return the other processes of one server."""
    return [process for process, found in own_processes() if found == server_id]


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Return the process tree below `process`, without it; empty if it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def remember(known: dict[int, psutil.Process], found: Iterable[psutil.Process]) -> None:
    """Update the processes `known` by id: those that ended leave, as their ids are used again."""
    for pid in [pid for pid, process in known.items() if not is_alive(process)]:
        del known[pid]
    known.update((process.pid, process) for process in found)


def is_alive(process: psutil.Process) -> bool:
    """Return whether exactly this process still runs, and is not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_processes(processes: Sequence[psutil.Process], grace_s: float) -> None:
    """Send SIGTERM, wait up to `grace_s`, kill what is left, and wait up to 5 s for its end."""
    left = list(processes)
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_LIMIT_S)):
        for process in left:
            send(process, number)
        left = wait_for_ends(left, limit_s)


def wait_for_ends(processes: Iterable[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Wait up to `limit_s` until all have ended; return those that have not.

    Unlike `psutil.wait_procs` it does not wait for zombies: in a container nobody may reap them.
    """
    end = time.monotonic() + limit_s
    while left := [process for process in processes if is_alive(process)]:
        if time.monotonic() >= end:
            break
        time.sleep(_POLL_S)
    return left


def send(process: psutil.Process, number: int) -> None:
    """Send a signal; psutil checks that the id was not reused by another process."""
    try:
        process.send_signal(number)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return
