"""macOS sensors: thermal and memory pressure, power source, low-power mode; needs no root."""

import re
import subprocess
import time
from collections.abc import Callable

from scheduler.sensors.macos_pages import available_bytes
from scheduler.thermal import Reading, SensorProblem, ThermalState

_THERMAL_KEY = b"com.apple.system.thermalpressurelevel"
_PRESSURE_KEY = b"kern.memorystatus_vm_pressure_level"
_LIBRARY = "/usr/lib/libSystem.B.dylib"
_PMSET = "/usr/bin/pmset"
_PMSET_LIMIT_S = 2.0
# Starting pmset costs more than all other readings, and power rarely changes.
_POWER_INTERVAL_S = 20.0

# Source: libkern/OSThermalNotification.h, the macOS values: nominal, moderate, heavy, trapping,
# sleeping.
_THERMAL_STATES = {
    0: ThermalState.NOMINAL,
    1: ThermalState.FAIR,
    2: ThermalState.SERIOUS,
    3: ThermalState.CRITICAL,
    4: ThermalState.CRITICAL,
}
# Source: dispatch/source.h, DISPATCH_MEMORYPRESSURE_NORMAL, _WARN and _CRITICAL.
_PRESSURE_STATES = {1: ThermalState.NOMINAL, 2: ThermalState.FAIR, 4: ThermalState.CRITICAL}

_LOW_POWER = re.compile(r"^\s*(?:lowpowermode|powermode)\s+(\d)\s*$", re.MULTILINE)
_SOURCE = re.compile(r"^Now drawing from '([^']{1,40})'", re.MULTILINE)
_CHARGE = re.compile(r"-InternalBattery-\d+[^\n]*?\s(\d{1,3})%;")


class MacSensor:
    """Reads each part separately: one that fails is unknown and does not affect the others.

    The readers are arguments so that recorded answers of macOS can be replayed on any system.
    """

    def __init__(
        self,
        thermal_level: Callable[[], int] | None = None,
        pressure_level: Callable[[], int] | None = None,
        run_pmset: Callable[..., str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        available: Callable[[], int] | None = None,
    ) -> None:
        self._thermal_level = thermal_level or NotifyLevel(_THERMAL_KEY)
        self._pressure_level = pressure_level or (lambda: _sysctl_int(_PRESSURE_KEY))
        self._run_pmset = run_pmset or _run_pmset
        self._clock = clock
        self._available = available or available_bytes
        self._power = Reading()
        self._power_read_at: float | None = None

    def read(self) -> Reading:
        """Read all parts; blocks for `pmset` every 20 s."""
        problems: list[SensorProblem] = []
        thermal = _level("thermal", self._thermal_level, _THERMAL_STATES, problems)
        memory = _level("memory pressure", self._pressure_level, _PRESSURE_STATES, problems)
        available = self._read_available(problems)
        now = self._clock()
        if self._power_read_at is None or now - self._power_read_at >= _POWER_INTERVAL_S:
            self._power, self._power_read_at = self._read_power(), now
        power = self._power
        problems.extend(power.problems)
        return Reading(
            thermal, memory, power.is_low_power, power.battery, tuple(problems), available
        )

    def _read_available(self, problems: list[SensorProblem]) -> int | None:
        try:
            return self._available()
        except (OSError, AttributeError) as problem:
            problems.append(SensorProblem("available memory", str(problem)))
            return None

    def _read_power(self) -> Reading:
        try:
            is_low_power = low_power_mode(self._run_pmset("-g"))
            return Reading(
                is_low_power=is_low_power, battery=battery(self._run_pmset("-g", "batt"))
            )
        except (OSError, ValueError, subprocess.SubprocessError) as problem:
            return Reading(problems=(SensorProblem("power", str(problem)),))


class NotifyLevel:
    """The 64-bit state of a notify(3) key, registered once on the first call.

    Source: notify.h, `notify_register_check` and `notify_get_state`, which need no privilege.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._token: int | None = None

    def __call__(self) -> int:
        """Return the key's state.  Raises OSError if it cannot be read."""
        import ctypes

        library = ctypes.CDLL(_LIBRARY)
        if self._token is None:
            token = ctypes.c_int()
            status = library.notify_register_check(self._key, ctypes.byref(token))
            if status:
                raise OSError(f"notify_register_check failed with status {status}")
            self._token = token.value
        state = ctypes.c_uint64()
        status = library.notify_get_state(ctypes.c_int(self._token), ctypes.byref(state))
        if status:
            raise OSError(f"notify_get_state failed with status {status}")
        return state.value


def low_power_mode(text: str) -> bool | None:
    """Parse low-power mode from `pmset -g`; None if this Mac does not have it.

    Macs with a high-power mode write `powermode` instead: 0 automatic, 1 low, 2 high.
    Raises ValueError for text that is not pmset's.
    """
    if "Currently in use" not in text:
        raise ValueError("pmset -g gave no settings")
    found = _LOW_POWER.search(text)
    return found[1] == "1" if found else None


def battery(text: str) -> float | None:
    """Parse the charge, 0 to 1, from `pmset -g batt`; None on mains power.

    Raises ValueError for text that is not pmset's.
    """
    source = _SOURCE.search(text)
    if source is None:
        raise ValueError("pmset -g batt gave no power source")
    if source[1] != "Battery Power":
        return None
    charge = _CHARGE.search(text)
    if charge is None or int(charge[1]) > 100:
        raise ValueError("pmset -g batt gave no charge in percent")
    return int(charge[1]) / 100


def read_battery() -> float | None:
    """Return the charge, 0 to 1; None on mains power.  Blocks for `pmset`.

    Raises OSError, ValueError and subprocess.SubprocessError.
    """
    return battery(_run_pmset("-g", "batt"))


def _level(
    name: str,
    read: Callable[[], int],
    states: dict[int, ThermalState],
    problems: list[SensorProblem],
) -> ThermalState:
    try:
        level = read()
    except (OSError, AttributeError) as problem:
        problems.append(SensorProblem(name, str(problem)))
        return ThermalState.UNKNOWN
    if level not in states:
        problems.append(SensorProblem(name, f"the level {level} is not known"))
    return states.get(level, ThermalState.UNKNOWN)


def _sysctl_int(key: bytes) -> int:
    """Return a 32-bit sysctl value.  Raises OSError if it does not exist."""
    import ctypes

    value = ctypes.c_int32()
    size = ctypes.c_size_t(ctypes.sizeof(value))
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    if library.sysctlbyname(key, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)):
        raise OSError(ctypes.get_errno(), f"sysctl {key.decode()} failed")
    return value.value


def _run_pmset(*arguments: str) -> str:
    """Return what `pmset` prints.  Raises OSError and subprocess.SubprocessError."""
    result = subprocess.run(
        [_PMSET, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_PMSET_LIMIT_S,
        check=True,
        env={"LC_ALL": "C"},
    )
    return result.stdout.decode("utf-8", "replace")
