"""Attributes a process's memory footprint to the models it holds."""

from collections.abc import Collection
from dataclasses import dataclass

from core.units import MIB

# What stays in a process after its first model: the runtime's libraries, the allocator's reserve.
# The budget's margin covers it.
ALLOWANCE_BYTES = 256 * MIB


@dataclass(slots=True)
class _Share:
    """One model's part: `held` now, `opened` after its load, `later` may still be taken."""

    held_bytes: int
    opened_bytes: int
    later_bytes: int
    estimated_bytes: int


@dataclass(frozen=True, slots=True)
class Returned:
    """What an unload freed: `returned_bytes` of the `held_bytes` before it; 0 if not measured."""

    held_bytes: int = 0
    returned_bytes: int = 0


class FootprintBook:
    """Divides a process's footprint among its models (pure: all readings are arguments).

    Growth during a load belongs to the loaded model.  Later growth belongs to the models that ran
    meanwhile.
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
        """Add a model that was loaded between two readings.

        `floor_bytes` is its minimum: not every system counts mapped weights.  `later_bytes` it may
        take in addition once it runs; `estimated_bytes` is the estimate of the whole.
        """
        self._settle(before, self._shares)
        held = max(0, after - before)
        opened = max(held, floor_bytes)
        self._shares[model_id] = _Share(held, opened, later_bytes, estimated_bytes)

    def sample(self, now_bytes: int, active: Collection[str]) -> None:
        """Record a reading; `active` are the models that ran since the last one."""
        self._settle(now_bytes, active)

    def measured_bytes(self, model_id: str) -> int:
        """Return the most the model will hold, by measurement; 0 if nothing was measured.

        It exceeds the estimate only if that much is really held.
        """
        share = self._shares.get(model_id)
        if share is None:
            return 0
        foreseen = min(share.opened_bytes + share.later_bytes, share.estimated_bytes)
        return max(foreseen, share.held_bytes)

    def held_bytes(self, model_id: str) -> int:
        """Return what the model was seen to hold; 0 if nothing was measured."""
        share = self._shares.get(model_id)
        return 0 if share is None else share.held_bytes

    def closed(self, model_id: str, before: int, after: int) -> Returned:
        """Remove a model that was closed between two readings."""
        self._settle(before, self._shares)
        share = self._shares.pop(model_id, None)
        if share is None:
            return Returned()
        returned = max(0, before - after)
        # What was not returned belongs to the process from now on.
        self._own_bytes = max(0, self._own_bytes + share.held_bytes - returned)
        return Returned(share.held_bytes, returned)

    @property
    def kept_bytes(self) -> int:
        """Bytes the process holds beyond its models and ALLOWANCE_BYTES."""
        return max(0, self._own_bytes - self._first_own_bytes - ALLOWANCE_BYTES)

    def _settle(self, now_bytes: int, active: Collection[str]) -> None:
        held = sum(share.held_bytes for share in self._shares.values())
        growth = now_bytes - self._own_bytes - held
        takers = [self._shares[name] for name in active if name in self._shares]
        if growth < 0:
            # Take it from the process first; a model's share is settled when it closes.
            self._own_bytes = max(self._own_bytes + growth, self._first_own_bytes)
        elif takers:
            for share in takers:
                share.held_bytes += growth // len(takers)
        else:
            self._own_bytes += growth
