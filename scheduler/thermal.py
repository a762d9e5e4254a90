"""Thermal policy: from sensor readings to engine limits (pure: `now` is an argument)."""

from dataclasses import dataclass
from enum import IntEnum

from backends.limits import UNLIMITED, EngineLimits

# Hysteresis: a short peak does not throttle, one cool reading does not end throttling.
RISE_S = 4.0
FALL_S = 30.0

_LOW_BATTERY = 0.2
_SERIOUS_CHUNK_TOKENS = 64
_SERIOUS_PAUSE_S = 0.02
_CRITICAL_CHUNK_TOKENS = 32
_CRITICAL_PAUSE_S = 0.1


class ThermalState(IntEnum):
    """The strain on the machine, in Apple's terms; `UNKNOWN` is treated as no strain.

    Source: NSProcessInfo.ThermalState, whose values are 0 to 3 in this order.
    """

    UNKNOWN = -1
    NOMINAL = 0
    FAIR = 1
    SERIOUS = 2
    CRITICAL = 3

    @property
    def label(self) -> str:
        """The name shown to users and in metrics."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class SensorProblem:
    """Why a sensor gave no reading."""

    sensor: str
    message: str


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading of all sensors; UNKNOWN and None mean no reading.

    `battery` is the charge, 0 to 1, of a machine on battery; None on mains power too.
    `available_bytes` is what other applications leave beside the models in memory, on a Mac.
    """

    thermal: ThermalState = ThermalState.UNKNOWN
    memory: ThermalState = ThermalState.UNKNOWN
    is_low_power: bool | None = None
    battery: float | None = None
    problems: tuple[SensorProblem, ...] = ()
    available_bytes: int | None = None

    @property
    def state(self) -> ThermalState:
        """The worst of heat, memory pressure and power."""
        return max(self.thermal, self.memory, self._power)

    @property
    def causes(self) -> str:
        """What strains the machine, in words; empty if nothing does."""
        found = []
        if self.thermal > ThermalState.NOMINAL:
            found.append(f"the machine is hot ({self.thermal.label})")
        if self.memory > ThermalState.NOMINAL:
            found.append(f"memory is short ({self.memory.label})")
        if self.is_low_power:
            found.append("low power mode is on")
        if self.battery is not None:
            found.append(f"the battery is at {self.battery:.0%}")
        return ", ".join(found)

    @property
    def _power(self) -> ThermalState:
        if self.is_low_power or (self.battery is not None and self.battery <= _LOW_BATTERY):
            return ThermalState.SERIOUS
        if self.battery is not None:
            return ThermalState.FAIR
        return ThermalState.UNKNOWN if self.is_low_power is None else ThermalState.NOMINAL


@dataclass(frozen=True, slots=True)
class Strain:
    """The current state, and since when readings have been on one side of it.

    `bound` is the reading nearest to `state` since `since` (monotonic seconds); None while
    readings equal the state.
    """

    state: ThermalState
    bound: ThermalState | None = None
    since: float = 0.0


def advance(strain: Strain | None, seen: ThermalState, now: float) -> Strain:
    """Return the strain after a reading; the first reading (`strain` None) applies at once.

    The state rises after every reading of RISE_S was above it, to the lowest of them, and falls
    after every reading of FALL_S was below it, to the highest of them.
    """
    if strain is None or seen == strain.state:
        return Strain(seen if strain is None else strain.state)
    is_rising = seen > strain.state
    if strain.bound is None or is_rising != (strain.bound > strain.state):
        return Strain(strain.state, seen, now)
    bound = min(strain.bound, seen) if is_rising else max(strain.bound, seen)
    if now - strain.since < (RISE_S if is_rising else FALL_S):
        return Strain(strain.state, bound, strain.since)
    # A reading further away starts its own time now.
    return Strain(bound) if seen == bound else Strain(bound, seen, now)


@dataclass(frozen=True, slots=True)
class Directive:
    """What a state requires: engines apply `limits`, the scheduler the rest."""

    limits: EngineLimits = UNLIMITED
    pauses_jobs: bool = False
    keeps_cool: bool = False
    unloads_idle: bool = False

    @property
    def admits(self) -> bool:
        """Whether new requests are admitted."""
        return self.limits.admits


def directive(state: ThermalState, max_sequences: int, prefill_chunk_tokens: int) -> Directive:
    """Return what `state` requires of engines opened with these two options.

    1. Unknown, nominal: nothing.
    2. Fair: background jobs pause; interactive requests are not limited.
    3. Serious: half the sequences, small prompt chunks, paced decoding, smaller variants.
    4. Critical: running requests finish, paced; nothing new starts; idle models are unloaded.
    """
    if state <= ThermalState.NOMINAL:  # (1)
        return Directive()
    if state is ThermalState.FAIR:  # (2)
        return Directive(pauses_jobs=True)
    if state is ThermalState.SERIOUS:  # (3)
        chunk = min(prefill_chunk_tokens, _SERIOUS_CHUNK_TOKENS)
        limits = EngineLimits(max(max_sequences // 2, 1), chunk, _SERIOUS_PAUSE_S)
        return Directive(limits, pauses_jobs=True, keeps_cool=True)
    chunk = min(prefill_chunk_tokens, _CRITICAL_CHUNK_TOKENS)  # (4)
    limits = EngineLimits(0, chunk, _CRITICAL_PAUSE_S)
    return Directive(limits, pauses_jobs=True, keeps_cool=True, unloads_idle=True)
