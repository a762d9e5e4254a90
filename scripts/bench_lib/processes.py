"""CPU time and memory of processes and threads, from Linux's /proc.

On other systems `is_supported` is false and callers measure nothing.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc")
ENGINE_THREAD_NAME = "impetus-engine"


def is_supported() -> bool:
    """Whether this machine has the /proc files that are read here."""
    return (PROC / "self" / "smaps_rollup").exists()


def tree(pid: int) -> list[int]:
    """Return `pid` and all its living descendants."""
    try:
        root = psutil.Process(pid)
        return [pid, *(child.pid for child in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def process_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, including ended threads and children.

    Source: proc(5), /proc/pid/stat fields 14 to 17, in clock ticks.
    """
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def tree_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and its descendants."""
    total = 0.0
    for member in tree(pid):
        try:
            total += process_cpu_s(member)
        except FileNotFoundError:
            continue
    return total


def tree_pss_bytes(pid: int) -> int:
    """Return the memory of a process tree (PSS: shared pages are divided among their users)."""
    total = 0
    for member in tree(pid):
        try:
            lines = (PROC / str(member) / "smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Resident bytes: shared pages divided among their users, and pages of this process alone."""

    pss_bytes: int
    private_bytes: int


def process_memory(pid: int) -> ProcessMemory:
    """Return the memory of one process, including mapped files.  Raises OSError if it has ended.

    Source: proc(5), /proc/pid/smaps_rollup, in KiB.
    """
    sizes: dict[str, int] = {}
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        sizes[name] = int(value) * 1024
    return ProcessMemory(sizes["Pss:"], sizes["Private_Clean:"] + sizes["Private_Dirty:"])


def main_thread_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process's first thread.

    In a replica that thread runs only Ray's loop, which receives calls and checks for signals every
    10 ms.  Source: /proc/pid/task/tid/schedstat, first field, in nanoseconds.
    """
    return int((PROC / str(pid) / "task" / str(pid) / "schedstat").read_text().split()[0]) / 1e9


def engine_worker_cpu_s(pid: int) -> dict[int, float]:
    """Return the CPU seconds of the runtime's own worker threads, by thread id.

    They inherit their name from the engine's thread, which is the oldest and is left out: the
    server counts its time in the runtime itself.
    Source: /proc/pid/task/tid/schedstat, first field, in nanoseconds.
    """
    found: dict[int, float] = {}
    for task in (PROC / str(pid) / "task").iterdir():
        try:
            if (task / "comm").read_text().strip() == ENGINE_THREAD_NAME:
                run_ns = int((task / "schedstat").read_text().split()[0])
                found[int(task.name)] = run_ns / 1e9
        except (FileNotFoundError, ProcessLookupError):
            continue
    if found:
        del found[min(found)]
    return found


@dataclass(frozen=True, slots=True)
class GatewaySnapshot:
    """CPU seconds so far: both processes with their children, the runtime's part and Ray's."""

    router_cpu_s: float
    replica_cpu_s: float
    native_cpu_s: float
    worker_cpu_s: dict[int, float]
    ray_cpu_s: float


def gateway_cpu_s(before: GatewaySnapshot, after: GatewaySnapshot, again: GatewaySnapshot) -> float:
    """Return the CPU seconds between the first two snapshots, without the runtime's part.

    `again` follows `after` at once: each snapshot requests the server's own figures, and the time
    of that request is subtracted.
    """
    return _without_runtime(before, after) - _without_runtime(after, again)


def _without_runtime(before: GatewaySnapshot, after: GatewaySnapshot) -> float:
    """Return the CPU seconds between two snapshots, without the runtime's threads.

    A worker thread that ended in between is not subtracted: unattributed time counts as ours.
    """
    workers = sum(
        seconds - before.worker_cpu_s.get(thread, 0.0)
        for thread, seconds in after.worker_cpu_s.items()
    )
    whole = (after.router_cpu_s + after.replica_cpu_s) - (
        before.router_cpu_s + before.replica_cpu_s
    )
    return whole - workers - (after.native_cpu_s - before.native_cpu_s)
