"""Attributes a process's memory footprint to the models it holds."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from core.units import MIB

_STATUS = Path("/proc/self/status")
# What stays in a process after its first model: the runtime's libraries, the allocator's spare.
# The budget's margin is for that.
ALLOWANCE_BYTES = 256 * MIB

_LINE = re.compile(r"^(RssAnon|RssFile|VmSwap):\s+(\d{1,15}) kB$", re.MULTILINE)

# Source: libproc.h, proc_pid_rusage; sys/resource.h, RUSAGE_INFO_V2 and struct rusage_info_v2,
# whose ri_phys_footprint stands after a uuid of 16 bytes and seven 64-bit numbers.
_RUSAGE_INFO_V2 = 2
_RUSAGE_BYTES = 16 + 8 * 18
_FOOTPRINT_OFFSET = 16 + 8 * 7


@dataclass(slots=True)
class _Share:
    """One model's part: `held` now, `opened` when it was opened, `later` may still come."""

    held_bytes: int
    opened_bytes: int
    later_bytes: int
    estimated_bytes: int


@dataclass(frozen=True, slots=True)
class Returned:
    """What an unload gave back: `held_bytes` before it, `returned_bytes` of them; 0 unmeasured."""

    held_bytes: int = 0
    returned_bytes: int = 0


class FootprintBook:
    """Divides a process' footprint among its models.  All numbers are given, nothing is read.

    What a model takes while it is opened is its own.  What the process grows by afterwards
    belongs to the models that ran meanwhile.
    """

    def __init__(self, own_bytes: int) -> None:
        """`own_bytes` is the footprint without any model."""
        self._first_own_bytes = self._own_bytes = own_bytes
        self._shares: dict[str, _Share] = {}

    def opened(
        self,
        model_id: str,
        before: int,
        after: int,
        *,
        floor_bytes: int,
        later_bytes: int,
        estimated_bytes: int,
    ) -> None:
        """Take in a model that was opened between two readings.

        `floor_bytes` it holds in any case: mapped weights are not part of every system's
        footprint.  `later_bytes` it may take beyond that once it runs, all of it together
        `estimated_bytes` as far as anybody knows.
        """
        self._settle(before, self._shares)
        held = max(0, after - before)
        opened = max(held, floor_bytes)
        self._shares[model_id] = _Share(held, opened, later_bytes, estimated_bytes)

    def sample(self, now_bytes: int, active: Collection[str]) -> None:
        """Take in a reading; `active` are the models that ran since the last one."""
        self._settle(now_bytes, active)

    def measured_bytes(self, model_id: str) -> int:
        """Return what the model will hold at most, by what was measured; 0 where nothing was.

        More than the estimate only where it is really held: `later` may be held in part.
        """
        share = self._shares.get(model_id)
        if share is None:
            return 0
        foreseen = min(share.opened_bytes + share.later_bytes, share.estimated_bytes)
        return max(foreseen, share.held_bytes)

    def closed(self, model_id: str, before: int, after: int) -> Returned:
        """Take out a model that was closed between two readings."""
        self._settle(before, self._shares)
        share = self._shares.pop(model_id, None)
        if share is None:
            return Returned()
        returned = max(0, before - after)
        # What did not come back is the process' from now on.
        self._own_bytes = max(0, self._own_bytes + share.held_bytes - returned)
        return Returned(share.held_bytes, returned)

    @property
    def kept_bytes(self) -> int:
        """What the process holds beyond its models and the allowance for any process."""
        return max(0, self._own_bytes - self._first_own_bytes - ALLOWANCE_BYTES)

    def _settle(self, now_bytes: int, active: Collection[str]) -> None:
        held = sum(share.held_bytes for share in self._shares.values())
        growth = now_bytes - self._own_bytes - held
        takers = [self._shares[name] for name in active if name in self._shares]
        if growth < 0:
            # Freed meanwhile: first what nobody uses, a model's own part shows when it closes.
            self._own_bytes = max(self._own_bytes + growth, self._first_own_bytes)
        elif takers:
            for share in takers:
                share.held_bytes += growth // len(takers)
        else:
            self._own_bytes += growth
