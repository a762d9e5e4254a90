"""Finds, measures and ends the processes of the doctor's own server with ps(1)."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from scripts.doctor_lib.machine import Machine

_LIMIT_S = 10.0
# Lines are cut at this width: Ray's commands have thousands of characters each.
_WIDTH = "400"
# Thousands of processes: whatever is not listed would be left behind.
_MOST_BYTES = 2**24
_START_FORM = "%a %b %d %H:%M:%S %Y"
# On Linux `ps` adds ticks since the boot to a rounded time, so one start is shown as two seconds.
_START_ROUNDING_S = 1.0


class Processes:
    """The tree below one process, remembered: at the end some have lost their parent.

    A process is known by its id and start, as ids are used again.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: dict[int, float] = {}
        self._commands: dict[int, str] = {}

    def remember(self, root: int) -> None:
        """Add what is below `root`; blocks for `ps`."""
        table = self._table()
        below = {root} | {pid for pid in self._known if self._is_same(pid, table)}
        is_growing = True
        while is_growing:
            more = {pid for pid, (parent, _, _) in table.items() if parent in below} - below
            below |= more
            is_growing = bool(more)
        for pid in below - {root}:
            if pid in table:
                self._known[pid] = table[pid][1]
                self._commands[pid] = table[pid][2]

    def find(self, start: str) -> int:
        """Return the id of a running one whose command line begins with `start`; 0 if none does."""
        table = self._table()
        for pid in self._known:
            if self._is_same(pid, table) and table[pid][2].startswith(start):
                return pid
        return 0

    def memory_bytes(self, pid: int) -> int:
        """Return what a process holds in RAM; 0 if it has ended."""
        done = self._machine.run("ps", "-o", "rss=", "-p", str(pid), limit_s=_LIMIT_S)
        return int(done.text) * 1024 if done.text.isdigit() else 0

    def is_alive(self, pid: int) -> bool:
        """Return whether a remembered process still runs."""
        return self._is_same(pid, self._table())

    def alive(self) -> list[str]:
        """Return the commands of those that still run."""
        table = self._table()
        return [self._commands[pid] for pid in self._known if self._is_same(pid, table)]

    def kill(self) -> None:
        """Kill those that still run."""
        table = self._table()
        for pid in self._known:
            if self._is_same(pid, table):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _is_same(self, pid: int, table: dict[int, tuple[int, float, str]]) -> bool:
        if pid not in table or pid not in self._known:
            return False
        return abs(table[pid][1] - self._known[pid]) <= _START_ROUNDING_S

    def _table(self) -> dict[int, tuple[int, float, str]]:
        """Return parent, start and command of every process; zombies have ended already."""
        columns = ("-axo", "pid=,ppid=,state=,lstart=,command=")
        done = self._machine.run(
            "ps", *columns, limit_s=_LIMIT_S, extra={"COLUMNS": _WIDTH}, most_bytes=_MOST_BYTES
        )
        table = {}
        for line in done.text.splitlines():
            # lstart has five words, such as: Mon Nov 30 10:14:22 2026.
            words = line.split(None, 8)
            is_row = len(words) == 9 and words[0].isdigit() and words[1].isdigit()
            if is_row and not words[2].startswith("Z"):
                start = time.mktime(time.strptime(" ".join(words[3:8]), _START_FORM))
                table[int(words[0])] = (int(words[1]), start, words[8])
        return table
