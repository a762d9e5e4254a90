"""Checks this machine and the installation for what stops or slows the server.

Works before and after scripts/setup, installs and changes nothing, and leaves nothing behind
but its report.  Exit code: 0 all right, 2 with warnings, 1 if something stops the server,
130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType

from scripts.doctor_lib import mac, packages, readings, server, system, tools
from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.privacy import Privacy
from scripts.doctor_lib.report import write_report
from scripts.doctor_lib.row import FAIL, WARN, Row

# Cheap ones first: what stops the server is seen at once.
STEPS: Mapping[str, Sequence[Callable[[Machine], Iterator[Row]]]] = MappingProxyType(
    {
        "system": (system.rows, mac.rows),
        "tools": (tools.rows,),
        "pythons": (tools.python_rows,),
        "packages": (packages.rows,),
        "readings": (readings.reading_rows,),
        "compute": (readings.compute_rows,),
        "server": (server.rows,),
    }
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130
CODES: Mapping[str, int] = MappingProxyType({FAIL: 1, WARN: 2})


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    machine = machine or Machine()
    machine.may_sleep = options.sleep
    privacy = Privacy(machine.environment, str(machine.root))
    began = time.monotonic()
    rows: list[Row] = []
    durations: dict[str, float] = {}
    is_whole = True
    try:
        with _interruptible():
            for step in options.steps:
                _take(step, machine, privacy, rows, durations)
    except KeyboardInterrupt:
        is_whole = False
        print("\nInterrupted: what it had started is stopped.", flush=True)
    count = {state: sum(row.state == state for row in rows) for state in (FAIL, WARN)}
    took = time.monotonic() - began
    print(f"\n{count[FAIL]} stop the server, {count[WARN]} warnings; {took:.0f} s.")
    facts = {
        "is_whole": is_whole,
        "seconds": durations,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    try:
        paths = write_report(Path(options.report), rows, facts, privacy)
    except OSError as problem:
        print(f"The report could not be written to {options.report}: {problem.strerror}.")
    else:
        print(f"The report, without names and secrets, to be sent: {paths[0]} and {paths[1].name}")
    if not is_whole:
        return _INTERRUPTED
    return next((code for state, code in CODES.items() if count[state]), 0)


def _take(
    step: str, machine: Machine, privacy: Privacy, rows: list[Row], durations: dict[str, float]
) -> None:
    """Print the rows of a step and add them to `rows`, and its seconds to `durations`."""
    began = time.monotonic()
    print(f"-- {step}", flush=True)
    # Closed also where printing is interrupted: the step `server` stops its server then.
    with closing(checked(STEPS[step], machine)) as found:
        for row in found:
            rows.append(row)
            print(privacy.hide("\n".join(row.lines())), flush=True)
    durations[step] = round(time.monotonic() - began, 1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make a first signal that ends programs a KeyboardInterrupt, and ignore further ones."""

    def interrupt(*_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def checked(
    parts: Sequence[Callable[[Machine], Iterator[Row]]], machine: Machine
) -> Generator[Row, None, None]:
    """Yield the rows of a step; a check that breaks is a row too, and the others go on."""
    for part in parts:
        try:
            yield from part(machine)
        except Exception as problem:
            told = f"{type(problem).__name__}: {problem}"
            yield Row(
                part.__module__.rpartition(".")[2],
                WARN,
                "not finished",
                f"The check itself failed: {told}",
                "send the report",
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps",
        type=_steps,
        default=list(STEPS),
        help=f"steps to run, separated by commas (default: all: {','.join(STEPS)})",
    )
    parser.add_argument(
        "--sleep",
        action="store_true",
        help="in the step server, ask you to let the machine sleep during an answer",
    )
    parser.add_argument(
        "--report",
        default=tempfile.gettempdir(),
        help="folder of the report, an absolute path (default: the temporary folder)",
    )
    return parser


def _steps(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown) or 'nothing'} is not a step; the steps are {', '.join(STEPS)}"
        )
    return names


if __name__ == "__main__":
    sys.exit(main())
