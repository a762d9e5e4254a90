"""From what sensors say to what engines may do: pure, with `now` as an argument."""

from dataclasses import dataclass
from enum import IntEnum

from backends.limits import UNLIMITED, EngineLimits

# A short peak throttles nothing, and one cool moment does not end the throttling.
RISE_S = 4.0
FALL_S = 30.0

_LOW_BATTERY = 0.2
_SERIOUS_CHUNK_TOKENS = 64
_SERIOUS_PAUSE_S = 0.02
_CRITICAL_CHUNK_TOKENS = 32
_CRITICAL_PAUSE_S = 0.1


class ThermalState(IntEnum):
    """How strained the machine is, in Apple's words; `UNKNOWN` is treated as no strain.

    Source: NSProcessInfo.ThermalState, whose values are 0 to 3 in this order.
    """

    UNKNOWN = -1
    NOMINAL = 0
    FAIR = 1
    SERIOUS = 2
    CRITICAL = 3

    @property
    def label(self) -> str:
        """The name as users and metrics see it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class SensorProblem:
    """Why a sensor says nothing."""

    sensor: str
    message: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What the sensors say now; UNKNOWN and None stand for what they do not say.

    `battery` is the charge, 0 to 1, of a machine that runs on it; None on mains power too.
    """

    thermal: ThermalState = ThermalState.UNKNOWN
    memory: ThermalState = ThermalState.UNKNOWN
    is_low_power: bool | None = None
    battery: float | None = None
    problems: tuple[SensorProblem, ...] = ()

    @property
    def state(self) -> ThermalState:
        """The worst of heat, memory pressure and power."""
        return max(self.thermal, self.memory, self._power)

    @property
    def _power(self) -> ThermalState:
        if self.is_low_power or (self.battery is not None and self.battery <= _LOW_BATTERY):
            return ThermalState.SERIOUS
        if self.battery is not None:
            return ThermalState.FAIR
        return ThermalState.UNKNOWN if self.is_low_power is None else ThermalState.NOMINAL


@dataclass(frozen=True, slots=True)
class Strain:
    """The state that holds, and for how long readings have been on one side of it.

    `bound` is the reading nearest to `state` since `since` (monotonic seconds); None while
    readings agree with the state.
    """

    state: ThermalState
    bound: ThermalState | None = None
    since: float = 0.0


def advance(strain: Strain | None, seen: ThermalState, now: float) -> Strain:
    """Return the strain after a reading; None is the time before the first, which holds at once.

    The state rises once every reading of RISE_S was above it, to the lowest of them, and falls
    once every reading of FALL_S was below it, to the highest of them.
    """
    if strain is None or seen == strain.state:
        return Strain(seen if strain is None else strain.state)
    is_rising = seen > strain.state
    if strain.bound is None or is_rising != (strain.bound > strain.state):
        return Strain(strain.state, seen, now)
    bound = min(strain.bound, seen) if is_rising else max(strain.bound, seen)
    if now - strain.since < (RISE_S if is_rising else FALL_S):
        return Strain(strain.state, bound, strain.since)
    # What is still further away starts its own time at this reading.
    return Strain(bound) if seen == bound else Strain(bound, seen, now)


@dataclass(frozen=True, slots=True)
class Directive:
    """What a state asks of everyone: engines obey `limits`, the scheduler the rest."""

    limits: EngineLimits = UNLIMITED
    pauses_jobs: bool = False
    keeps_cool: bool = False
    unloads_idle: bool = False

    @property
    def admits(self) -> bool:
        """Whether new requests are taken."""
        return self.limits.admits


def directive(state: ThermalState, max_sequences: int, prefill_chunk_tokens: int) -> Directive:
    """Return what `state` asks of engines opened with these two options.

    1. Unknown, nominal: nothing.
    2. Fair: background jobs pause; interactive work is left alone.
    3. Serious: half the sequences, small prompt chunks, paced decoding, smaller variants.
    4. Critical: what runs finishes, paced; nothing new starts; idle models are unloaded.
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
