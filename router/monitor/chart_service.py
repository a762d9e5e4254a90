"""Charts and the thermal state as the API shows them, and the Protocol that the routes need."""

from typing import Literal, Protocol, TypeAlias

from router.job_service import Answer
from router.monitor.history import SeriesName

RangeName: TypeAlias = Literal["1h", "6h", "24h"]
RANGES_S: dict[RangeName, float] = {"1h": 3600.0, "6h": 21_600.0, "24h": 86_400.0}
Unit: TypeAlias = Literal["bytes", "tokens/s", "s", "requests", "cores", "state"]
UNITS: dict[SeriesName, Unit] = {
    "memory": "bytes",
    "tokens": "tokens/s",
    "first_token": "s",
    "requests": "requests",
    "cpu": "cores",
    "thermal": "state",
}


class SeriesLine(Answer):
    """One line of a chart: least, mean and greatest value of each time step, null without a sample.

    `model` is empty where the line is not about a model.
    """

    label: str
    model: str
    min: tuple[float | None, ...]
    mean: tuple[float | None, ...]
    max: tuple[float | None, ...]


class SeriesAnswer(Answer):
    """A chart: step `i` begins at `start + i * step_s`, in Unix seconds.

    The last step goes on.  A sample was taken about every `sample_s` seconds, since `begun_at` at
    the earliest, when the process that answers was started.
    """

    name: SeriesName
    unit: Unit
    start: float
    step_s: float
    sample_s: float
    begun_at: float
    lines: tuple[SeriesLine, ...]


class ThrottleView(Answer):
    """What the state requires; `usual_` are the values of the settings, null is no limit.

    `decode_pause_s` is a pause between two steps of an engine.  `jobs_pause`: downloads and
    conversions wait.  `prefers_small`: a bare name of a model means its smallest variant.
    """

    is_throttled: bool
    admits_requests: bool
    max_sequences: int | None
    usual_max_sequences: int
    prefill_chunk_tokens: int | None
    usual_prefill_chunk_tokens: int
    decode_pause_s: float
    jobs_pause: bool
    prefers_small: bool
    unloads_idle: bool


class ThermalAnswer(Answer):
    """The strain on the scheduler's machine, what it leads to, and why.

    States are nominal, fair, serious, critical, and unknown without a sensor.  `state` is the worst
    of `heat`, `memory_pressure` and power after hysteresis; `reason` says what causes it, empty if
    nothing does.  `battery` is the charge, 0 to 1, of a machine on battery.  `throttled_s` are
    seconds under limits, `changes` those of the state, since the scheduler's start.
    """

    state: str
    reason: str
    heat: str
    memory_pressure: str
    is_low_power: bool | None
    battery: float | None
    throttle: ThrottleView
    changes: int
    throttled_s: float
    sensor_problems: tuple[str, ...]


class Monitor(Protocol):
    """What was measured of the server."""

    async def series(self, name: SeriesName, range_s: float, points: int) -> SeriesAnswer:
        """Return a chart of at most `points` steps up to now."""
        ...

    async def thermal(self) -> ThermalAnswer:
        """Return the thermal state.  Raises Unavailable if the scheduler does not answer."""
        ...
