"""Autoscaling decision: the number of processes per format (pure)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ScalingDirective:
    """What the scheduler allows; the default allows only the first process of a format.

    `admits`: whether a format without a process may start one.  `growing` formats may get one
    more process as far as memory and heat allow; `finished` ones are no longer needed.
    """

    admits: bool = True
    growing: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Serialize the directive to JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ScalingDirective":
        """Parse a directive.  Raises ValueError or KeyError for invalid text."""
        content = json.loads(text)
        return cls(bool(content["admits"]), tuple(content["growing"]), tuple(content["finished"]))


@dataclass(frozen=True, slots=True)
class FormatDemand:
    """One format: its running and waiting requests, and its current, minimum and maximum processes.

    `served` is the target number of requests per process.
    """

    requests: float
    processes: int
    least: int
    most: int
    served: float


@dataclass(frozen=True, slots=True)
class FormatUse:
    """Usage of a format's models, by the ledger.

    `idle_s`: seconds since any of them was loaded or used.  `is_kept`: one of them is pinned or
    has a keep-alive.  `is_busy`: one runs a request or is being loaded.
    """

    idle_s: float
    is_kept: bool = False
    is_busy: bool = False


def desired_processes(
    demand: Mapping[str, FormatDemand], directive: ScalingDirective
) -> dict[str, int]:
    """Return the number of processes by format; a format that is left out stays unchanged.

    1. No process and waiting requests: start the first, unless no new work is admitted.  Then the
       format is left out, since Serve would start one for any number.
    2. More requests than the processes' target: one more, if it may grow.
    3. No requests and finished: the minimum.
    4. Else unchanged.
    """
    numbers: dict[str, int] = {}
    for name, one in demand.items():
        if not one.processes:  # (1)
            if not one.requests or directive.admits:
                numbers[name] = max(one.least, 1 if one.requests else 0)
            continue
        is_short = one.requests > one.served * one.processes
        if is_short and name in directive.growing:  # (2)
            numbers[name] = min(one.processes + 1, one.most)
        elif not one.requests and name in directive.finished:  # (3)
            numbers[name] = one.least
        else:
            numbers[name] = max(one.processes, one.least)  # (4)
    return numbers


def finished(uses: Mapping[str, FormatUse], idle_s: float, *, unloads_idle: bool) -> list[str]:
    """Return the formats whose processes may stop: unused for `idle_s`, or at once under strain."""
    return sorted(
        name
        for name, use in uses.items()
        if not (use.is_kept or use.is_busy) and (unloads_idle or use.idle_s >= idle_s)
    )
