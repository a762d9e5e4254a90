"""What a probe, which runs in a process of the virtual environment, tells the doctor."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from scripts.doctor_lib.row import FAIL


@dataclass(frozen=True)
class Found:
    """A probe's value and, if something is wrong, its problem, cure and state."""

    value: str
    problem: str = ""
    cure: str = ""
    state: str = FAIL


def print_result(probes: Mapping[str, Callable[[], Found]], name: str) -> None:
    """Run the probe of this name and print its result as the last line."""
    result = probes[name]()
    sys.stdout.write(f"\n{json.dumps(asdict(result))}\n")
