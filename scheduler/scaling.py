"""How many processes each format has: pure, from what the scheduler allows and Serve counts."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ScalingDirective:
    """What the scheduler allows; the default allows starts alone.

    `admits`: whether a format without a process may get its first.  `growing` formats may have
    one process more, as far as memory and heat go; `finished` ones are needed no more.
    """

    admits: bool = True
    growing: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ScalingDirective":
        """Return the directive.  Raises ValueError or KeyError for other text."""
        content = json.loads(text)
        return cls(bool(content["admits"]), tuple(content["growing"]), tuple(content["finished"]))


@dataclass(frozen=True, slots=True)
class FormatDemand:
    """One format: requests that run or wait there, and its processes now, least and most.

    `served` are the requests that one process is meant for.
    """

    requests: float
    processes: int
    least: int
    most: int
    served: float


@dataclass(frozen=True, slots=True)
class FormatUse:
    """What the ledger knows of a format's models.

    `idle_s` is how long none was used or held; `is_kept`: one of them must not be lost,
    `is_busy`: one runs a request or is being loaded.
    """

    idle_s: float
    is_kept: bool = False
    is_busy: bool = False


def desired_processes(
    demand: Mapping[str, FormatDemand], directive: ScalingDirective
) -> dict[str, int]:
    """Return the number of processes by format; one that is left out stays as it is.

    1. None runs and requests wait: the first one starts, unless no new work is taken.  Then it
       is left out, since Serve starts one for whatever number is named.
    2. More requests than the processes are meant for: one more, where it may grow.
    3. Nothing is asked of it and it is finished: the least.
    4. Else as it is.
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
    """Return the formats whose processes may end: unused for `idle_s`, or at once under strain."""
    return sorted(
        name
        for name, use in uses.items()
        if not (use.is_kept or use.is_busy) and (unloads_idle or use.idle_s >= idle_s)
    )
