"""Measures the CPU cost of taking an uncontended turn on the accelerator."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from backends.engine.accelerator_lock import AcceleratorLock
from scripts.bench_lib.report.figures import Spread, Verdict, spread
from scripts.bench_lib.report.page import table
from scripts.bench_lib.servers import ROOT

MOST_TURN_US = 20.0
ROUNDS = 200
TURNS = 250

# A second process that is registered and idle until its input ends.
_NEIGHBOUR = """
import sys
from pathlib import Path
from backends.engine.accelerator_lock import AcceleratorLock
lock = AcceleratorLock(Path(sys.argv[1]))
lock.register()
print("ready", flush=True)
sys.stdin.read()
lock.close()
"""


@dataclass(frozen=True, slots=True)
class TurnsResult:
    """CPU microseconds per turn by round: alone, and with a second, idle process."""

    alone: Spread
    shared: Spread


def measure_turns(rounds: int = ROUNDS, turns: int = TURNS) -> TurnsResult:
    """Take turns in this process; subtracts the time of an empty loop."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "turns"
        lock = AcceleratorLock(path)
        lock.register()
        try:
            alone = _measure(lock, rounds, turns)
            neighbour = subprocess.Popen(
                [sys.executable, "-c", _NEIGHBOUR, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
            with neighbour:
                assert neighbour.stdin is not None
                assert neighbour.stdout is not None
                neighbour.stdout.readline()
                shared = _measure(lock, rounds, turns)
                neighbour.stdin.close()
        finally:
            lock.close()
    return TurnsResult(alone, shared)


def _measure(lock: AcceleratorLock, rounds: int, turns: int) -> Spread:
    found = spread([_round(lock.hold, turns) - _round(nullcontext, turns) for _ in range(rounds)])
    assert found is not None
    return found


def _round(turn: Callable[[], AbstractContextManager[None]], turns: int) -> float:
    # CPU time, not wall time: other load on the machine must not count.
    began = time.thread_time()
    for _ in range(turns):
        with turn():
            pass
    return (time.thread_time() - began) / turns * 1e6


def turns_verdict(result: TurnsResult) -> Verdict:
    """Compare the median with a second process with the target."""
    return Verdict(
        "turn on the accelerator, uncontended",
        f"≤ {MOST_TURN_US:.0f} µs of CPU a step",
        f"{result.shared.text(1)} µs",
        result.shared.median <= MOST_TURN_US,
    )


def turns_table(result: TurnsResult) -> str:
    """Return the section's text."""
    rows = [
        ("one engine process", result.alone.text(1)),
        ("beside an idle second one", result.shared.text(1)),
    ]
    return table(("engine processes registered", "CPU, µs a turn, median (least–greatest)"), rows)
