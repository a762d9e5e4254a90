"""Linux sensors: thermal zones with their trip points, and memory pressure (PSI)."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from scheduler.thermal import Reading, SensorProblem, ThermalState

_ZONES = Path("/sys/class/thermal")
_PRESSURE = Path("/proc/pressure/memory")
_MOST_BYTES = 4096
_MOST_ZONES = 256
_MOST_TRIPS = 32

# Zones that are off or have no driver report implausible temperatures.
_LEAST_C, _MOST_C = 1.0, 150.0
_FAIR_BELOW_PASSIVE_C = 10.0
_CRITICAL_BELOW_CRITICAL_C = 5.0
_SERIOUS_BELOW_CRITICAL_C = 15.0

# Percent of ten seconds in which all tasks were stalled on memory.
_FAIR_STALL, _CRITICAL_STALL = 20.0, 40.0
_FULL_AVG10 = re.compile(r"^full avg10=(\d{1,3}\.\d{1,4}) ", re.MULTILINE)


class LinuxSensor:
    """Reads the hottest zone, judged by its own trip points, and the memory stall."""

    def __init__(self, zones: Path = _ZONES, pressure: Path = _PRESSURE) -> None:
        self._zones = zones
        self._pressure = pressure

    def read(self) -> Reading:
        """Read zones and PSI; power is not read."""
        problems: list[SensorProblem] = []
        states = [zone_state(*zone) for zone in self._read_zones()]
        thermal = max(states, default=ThermalState.UNKNOWN)
        if thermal is ThermalState.UNKNOWN:
            message = f"no zone in {self._zones} has a temperature and a trip point"
            problems.append(SensorProblem("thermal", message))
        memory = ThermalState.UNKNOWN
        try:
            memory = pressure_state(_text(self._pressure))
        except (OSError, ValueError) as problem:
            problems.append(SensorProblem("memory pressure", f"{self._pressure}: {problem}"))
        return Reading(thermal, memory, problems=tuple(problems))

    def _read_zones(self) -> Iterable[tuple[float, Mapping[str, float]]]:
        """Yield (°C, lowest °C of each kind of trip point) of every readable zone."""
        for zone in sorted(self._zones.glob("thermal_zone*"))[:_MOST_ZONES]:
            temperature = _celsius(zone / "temp")
            if temperature is not None:
                yield temperature, _trip_points(zone)


def zone_state(temperature_c: float, trips_c: Mapping[str, float]) -> ThermalState:
    """Return the state of one zone from its temperature and its trip points by kind.

    `passive` is where the kernel starts to slow the processor, `hot` and `critical` where it
    warns and shuts down.  Source: the kernel's Documentation/driver-api/thermal/sysfs-api.rst.
    """
    ends = [trips_c[kind] for kind in ("hot", "critical") if kind in trips_c]
    passive = trips_c.get("passive")
    if ends and temperature_c >= min(ends) - _CRITICAL_BELOW_CRITICAL_C:
        return ThermalState.CRITICAL
    if passive is None:
        if not ends:
            return ThermalState.UNKNOWN
        passive = min(ends) - _SERIOUS_BELOW_CRITICAL_C
    if temperature_c >= passive:
        return ThermalState.SERIOUS
    if temperature_c >= passive - _FAIR_BELOW_PASSIVE_C:
        return ThermalState.FAIR
    return ThermalState.NOMINAL


def pressure_state(text: str) -> ThermalState:
    """Parse `/proc/pressure/memory`.  Raises ValueError for other text.

    Source: the kernel's Documentation/accounting/psi.rst.
    """
    found = _FULL_AVG10.search(text)
    if found is None or (stall := float(found[1])) > 100:
        raise ValueError("it has no `full avg10` in percent")
    if stall >= _CRITICAL_STALL:
        return ThermalState.CRITICAL
    return ThermalState.FAIR if stall >= _FAIR_STALL else ThermalState.NOMINAL


def _trip_points(zone: Path) -> dict[str, float]:
    trips: dict[str, float] = {}
    for kind_path in sorted(zone.glob("trip_point_*_type"))[:_MOST_TRIPS]:
        try:
            kind = _text(kind_path).strip()
        except OSError:
            continue
        temperature = _celsius(kind_path.with_name(kind_path.name.removesuffix("type") + "temp"))
        if temperature is not None:
            trips[kind] = min(temperature, trips.get(kind, temperature))
    return trips


def _celsius(path: Path) -> float | None:
    """Return a file's millidegrees as °C; None if unreadable or implausible."""
    try:
        celsius = float(_text(path)) / 1000
    except (OSError, ValueError):
        return None
    return celsius if _LEAST_C <= celsius <= _MOST_C else None


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MOST_BYTES).decode("ascii", "replace")
