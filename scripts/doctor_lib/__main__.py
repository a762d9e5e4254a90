"""Checks this machine and the installation for what stops or slows the server.

Works before and after scripts/setup, installs and changes nothing, and leaves nothing behind
but its report.  Exit code: 0 all right, 2 with warnings, 1 if something stops the server.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
CODES: Mapping[str, int] = MappingProxyType({FAIL: 1, WARN: 2})


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    machine = machine or Machine()
    machine.may_sleep = options.sleep
    privacy = Privacy(machine.environment)
    began = time.monotonic()
    rows: list[Row] = []
    durations: dict[str, float] = {}
    for step in options.steps:
        step_began = time.monotonic()
        print(f"-- {step}", flush=True)
        for row in checked(STEPS[step], machine):
            rows.append(row)
            print(privacy.hide("\n".join(row.lines())), flush=True)
        durations[step] = round(time.monotonic() - step_began, 1)
    count = {state: sum(row.state == state for row in rows) for state in (FAIL, WARN)}
    took = time.monotonic() - began
    print(f"\n{count[FAIL]} stop the server, {count[WARN]} warnings; {took:.0f} s.")
    facts = {
        "seconds": durations,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    try:
        paths = write_report(Path(options.report), rows, facts, privacy)
    except OSError as problem:
        print(f"The report could not be written to {options.report}: {problem.strerror}.")
    else:
        print(f"The report, without names and secrets: {paths[0]} and {paths[1].name}")
    return next((code for state, code in CODES.items() if count[state]), 0)


def checked(parts: Sequence[Callable[[Machine], Iterator[Row]]], machine: Machine) -> Iterator[Row]:
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
