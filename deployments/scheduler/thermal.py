"""Watches heat, memory pressure and power, and sends limits to the engines."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from backends.limits import UNLIMITED, EngineLimits
from core.errors import Unavailable
from core.settings import Settings
from core.supervision import attempt, call_in_thread
from deployments.decisions import DecisionLog
from deployments.serve.handles import Handle, call
from deployments.serve.status import running_deployments
from scheduler.sensors.machine import Sensor, open_sensor
from scheduler.thermal import (
    FALL_S,
    Directive,
    Reading,
    SensorProblem,
    Strain,
    ThermalState,
    advance,
    directive,
)

logger = logging.getLogger(__name__)

POLL_S = 2.0
_SENSOR_LIMIT_S = 5.0
_CALL_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class ThermalReport:
    """For metrics: the current state, the last reading and the time spent throttled.

    `throttled_s` are seconds under limits, `changes` the changes of state since the start.
    """

    state: ThermalState = ThermalState.UNKNOWN
    reading: Reading = field(default_factory=Reading)
    limits: EngineLimits = UNLIMITED
    changes: int = 0
    throttled_s: float = 0.0


class ThermalWatch:
    """Polls the sensors and sends the resulting limits to all formats.

    `on_directive` gets the directive at every poll, for everything that is not an engine.  Used
    from one event loop: a task runs `run`, others read the properties.  Engines that restart have
    no limits, so limits are sent again at every poll while there are any.
    """

    def __init__(
        self,
        settings: Settings,
        formats: Mapping[str, Handle],
        *,
        running: Callable[[], Awaitable[frozenset[str]]] = running_deployments,
        on_directive: Callable[[Directive], Awaitable[None]] | None = None,
        sensor: Sensor | None = None,
        clock: Callable[[], float] = time.monotonic,
        sensor_limit_s: float = _SENSOR_LIMIT_S,
        log: DecisionLog | None = None,
    ) -> None:
        self._settings = settings
        self._formats = formats
        self._running = running
        self._on_directive = on_directive
        self._reader = SensorReader(sensor or open_sensor(settings.thermal_file), sensor_limit_s)
        self._clock = clock
        self._strain: Strain | None = None
        self._directive = Directive()
        self._report = ThermalReport()
        self._polled_at: float | None = None
        # Formats that may still apply old limits; at the start that is any of them.
        self._limited = set(formats)
        self._warned_sensors: set[str] = set()
        self._log = log or DecisionLog()

    @property
    def state(self) -> ThermalState:
        """The current state."""
        return self._report.state

    @property
    def directive(self) -> Directive:
        """The directive of the current state."""
        return self._directive

    @property
    def admits(self) -> bool:
        """Whether new requests and loads are admitted."""
        return self._directive.admits

    @property
    def strain(self) -> str:
        """Why long jobs pause; empty if they may run."""
        if not self._directive.pauses_jobs:
            return ""
        return self._report.reading.causes or f"the machine recovers ({self.state.label})"

    def check_admits(self, model_id: str) -> None:
        """Raise Unavailable if the machine is under too much strain for another load."""
        if not self.admits:
            raise Unavailable(
                f"{model_id} is not loaded: the machine is under too much strain "
                f"({self.state.label}). Try again later.",
                retry_after_s=self.retry_after_s,
            )

    @property
    def retry_after_s(self) -> int:
        """Seconds after which a rejected request may try again: the shortest recovery."""
        return int(FALL_S)

    @property
    def report(self) -> ThermalReport:
        """The values for metrics."""
        return self._report

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await attempt(self.poll)
            await asyncio.sleep(POLL_S)

    async def poll(self) -> None:
        """Read the sensors once and apply the resulting directive."""
        reading = await self._reader.read()
        self._warn_once(reading.problems)
        self._update(reading, self._clock())
        try:
            await self._send_limits(self._directive.limits)
        finally:
            if self._on_directive is not None:
                await self._on_directive(self._directive)

    def _warn_once(self, problems: tuple[SensorProblem, ...]) -> None:
        """Log each sensor's problem once."""
        for problem in problems:
            if problem.sensor not in self._warned_sensors:
                self._warned_sensors.add(problem.sensor)
                logger.info("no throttling by %s: %s", problem.sensor, problem.message)

    def _update(self, reading: Reading, now: float) -> None:
        known, old = self._strain, self._report
        self._strain = advance(known, reading.state, now)
        state = self._strain.state
        is_changed = known is not None and state != known.state
        if is_changed or (known is None and state > ThermalState.NOMINAL):
            logger.warning("thermal state: %s, was %s", state.label, old.state.label)
            self._log_change(state, reading)
        throttled_s = old.throttled_s
        if old.limits != UNLIMITED and self._polled_at is not None:
            throttled_s += now - self._polled_at
        self._polled_at = now
        self._directive = directive(
            state, self._settings.max_sequences, self._settings.prefill_chunk_tokens
        )
        self._report = ThermalReport(
            state, reading, self._directive.limits, old.changes + is_changed, throttled_s
        )

    def _log_change(self, state: ThermalState, reading: Reading) -> None:
        """Log what a new state requires of the engines, and its cause."""
        limits = directive(
            state, self._settings.max_sequences, self._settings.prefill_chunk_tokens
        ).limits
        self._log.record(
            "thermal",
            "lift limits" if limits == UNLIMITED else "limit engines",
            f"the machine is {state.label} (heat {reading.thermal.label}, "
            f"memory {reading.memory.label})",
        )

    async def _send_limits(self, limits: EngineLimits) -> None:
        """Send the limits to the running formats; a failed call is repeated at the next poll."""
        if limits == UNLIMITED and not self._limited:
            return
        running = await self._running()
        # An engine that starts later has no limits.
        self._limited &= running
        told = [
            name
            for name in self._formats
            if name in running and (limits != UNLIMITED or name in self._limited)
        ]
        answers = await asyncio.gather(*(self._send_to(name, limits) for name in told))
        for name, is_told in zip(told, answers, strict=True):
            if is_told and limits == UNLIMITED:
                self._limited.discard(name)
            else:
                self._limited.add(name)

    async def _send_to(self, name: str, limits: EngineLimits) -> bool:
        try:
            async with asyncio.timeout(_CALL_LIMIT_S):
                await call(self._formats[name].set_limits.remote(limits))
        except Exception as problem:
            logger.warning("sending limits to %s failed, it is tried again: %s", name, problem)
            return False
        return True


class SensorReader:
    """Reads a sensor on its own thread; a sensor that hangs blocks only that thread."""

    def __init__(self, sensor: Sensor, limit_s: float) -> None:
        self._sensor = sensor
        self._limit_s = limit_s
        self._pending: asyncio.Task[Reading] | None = None

    async def read(self) -> Reading:
        """Return the sensor's reading; an unknown one if it fails or takes too long."""
        if self._pending is None:
            self._pending = asyncio.ensure_future(call_in_thread("impetus-sensor", self._work))
        done, _ = await asyncio.wait({self._pending}, timeout=self._limit_s)
        if not done:
            return _unknown(f"no answer within {self._limit_s:g} s")
        finished, self._pending = self._pending, None
        if finished.cancelled():
            return _unknown("its reading was cancelled")
        # A thread that cannot be started; the next poll tries it again.
        problem = finished.exception()
        return finished.result() if problem is None else _unknown(str(problem))

    def _work(self) -> Reading:
        try:
            return self._sensor.read()
        except BaseException as problem:
            # Bindings of the system's libraries raise what is not an Exception.
            return _unknown(str(problem) or type(problem).__name__)


def _unknown(message: str) -> Reading:
    return Reading(problems=(SensorProblem("sensor", message),))
