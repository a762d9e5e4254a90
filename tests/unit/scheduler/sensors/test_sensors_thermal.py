"""What macOS, Linux and the simulated file answer, as recorded; and what makes no sense."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.sensors.linux import LinuxSensor, pressure_state, zone_state
from scheduler.sensors.machine import NoSensor, open_sensor
from scheduler.sensors.macos import MacSensor, NotifyLevel, battery, low_power_mode
from scheduler.sensors.simulated import FileSensor
from scheduler.thermal import ThermalState

UNKNOWN, NOMINAL, FAIR, SERIOUS, CRITICAL = ThermalState

PMSET = """\
System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by powerd)
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
 lowpowermode         0
 womp                 0
"""
PMSET_LOW = PMSET.replace("lowpowermode         0", "lowpowermode         1")
PMSET_MODES = PMSET.replace("lowpowermode ", "powermode    ")
MAINS = """\
Now drawing from 'AC Power'
 -InternalBattery-0 (id=22806627)\t83%; charging; 1:00 remaining present: true
"""
BATTERY = """\
Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22806627)\t19%; discharging; 1:02 remaining present: true
"""
DESKTOP = "Now drawing from 'AC Power'\n"
PRESSURE = """\
some avg10=2.10 avg60=0.44 avg300=0.10 total=53183829
full avg10={:.2f} avg60=0.31 avg300=0.07 total=42093827
"""


def mac(
    thermal: Callable[[], int] = lambda: 0,
    pressure: Callable[[], int] = lambda: 1,
    settings: str = PMSET,
    source: str = MAINS,
) -> MacSensor:
    def pmset(*options: str) -> str:
        return source if "batt" in options else settings

    return MacSensor(thermal, pressure, pmset, available=lambda: 1)


@pytest.mark.parametrize(
    ("level", "state"), [(0, NOMINAL), (1, FAIR), (2, SERIOUS), (3, CRITICAL), (4, CRITICAL)]
)
def test_mac_thermal_levels_are_the_states(level: int, state: ThermalState) -> None:
    assert mac(thermal=lambda: level).read().thermal is state


@pytest.mark.parametrize(("level", "state"), [(1, NOMINAL), (2, FAIR), (4, CRITICAL)])
def test_mac_memory_pressure_levels_are_states(level: int, state: ThermalState) -> None:
    assert mac(pressure=lambda: level).read().memory is state


@pytest.mark.parametrize("level", [5, 50, 2**63])
def test_a_level_without_meaning_is_unknown(level: int) -> None:
    reading = mac(thermal=lambda: level).read()
    assert reading.thermal is UNKNOWN
    assert reading.memory is NOMINAL
    assert [problem.sensor for problem in reading.problems] == ["thermal"]


def test_a_part_that_fails_leaves_the_others_alone() -> None:
    def fail() -> int:
        raise OSError(2, "no such key")

    reading = mac(thermal=lambda: 2, pressure=fail, settings="garbage").read()
    assert reading.thermal is SERIOUS
    assert reading.memory is UNKNOWN
    assert reading.is_low_power is None
    assert {problem.sensor for problem in reading.problems} == {"memory pressure", "power"}


@pytest.mark.parametrize(
    ("text", "is_on"),
    [
        (PMSET, False),
        (PMSET_LOW, True),
        (PMSET_MODES, False),
        (PMSET_MODES.replace("powermode            0", "powermode            1"), True),
        (PMSET_MODES.replace("powermode            0", "powermode            2"), False),
        (PMSET.replace(" lowpowermode         0\n", ""), None),
    ],
)
def test_low_power_mode_is_read_from_pmset(text: str, is_on: bool | None) -> None:
    assert low_power_mode(text) is is_on


@pytest.mark.parametrize(("text", "charge"), [(MAINS, None), (BATTERY, 0.19), (DESKTOP, None)])
def test_the_charge_counts_on_battery_only(text: str, charge: float | None) -> None:
    assert battery(text) == charge


@pytest.mark.parametrize("text", ["", "pmset: error", BATTERY.replace("19%", "919%"), "\0" * 99])
def test_nonsense_is_no_power_source(text: str) -> None:
    with pytest.raises(ValueError, match="pmset"):
        battery(text)


@pytest.mark.parametrize(
    "problem",
    [FileNotFoundError("no pmset"), subprocess.TimeoutExpired("pmset", 2.0)],
    ids=["missing", "hung"],
)
def test_pmset_that_is_missing_or_hangs_is_unknown(problem: Exception) -> None:
    def fail(*options: str) -> str:
        del options
        raise problem

    reading = MacSensor(lambda: 1, lambda: 1, fail, available=lambda: 1).read()
    assert (reading.is_low_power, reading.battery) == (None, None)
    assert reading.state is FAIR
    assert [found.sensor for found in reading.problems] == ["power"]


def test_pmset_runs_seldom() -> None:
    calls: list[tuple[str, ...]] = []
    now = [0.0]

    def run(*options: str) -> str:
        calls.append(options)
        return BATTERY if "batt" in options else PMSET_LOW

    sensor = MacSensor(lambda: 0, lambda: 1, run, lambda: now[0])
    readings = [sensor.read() for _ in range(5)]
    assert calls == [("-g",), ("-g", "batt")]
    assert {(reading.is_low_power, reading.battery) for reading in readings} == {(True, 0.19)}
    now[0] = 60.0
    sensor.read()
    assert len(calls) == 4


@pytest.mark.skipif(os.path.exists("/usr/lib/dyld"), reason="macOS has the library")
def test_a_system_without_the_library_is_unknown() -> None:
    reading = MacSensor(NotifyLevel(b"some.key"), lambda: 1, lambda *_: DESKTOP).read()
    assert reading.thermal is UNKNOWN


@pytest.mark.macos
@pytest.mark.skipif(not os.path.exists("/usr/lib/dyld"), reason="needs macOS")
def test_this_mac_answers() -> None:
    reading = MacSensor().read()
    assert reading.thermal is not UNKNOWN
    assert reading.memory is not UNKNOWN
    assert not reading.problems


@pytest.mark.parametrize(
    ("celsius", "state"),
    [(40.0, NOMINAL), (80.0, FAIR), (85.0, SERIOUS), (94.9, SERIOUS), (95.0, CRITICAL)],
)
def test_a_zone_is_judged_by_its_trip_points(celsius: float, state: ThermalState) -> None:
    assert zone_state(celsius, {"passive": 85.0, "critical": 100.0}) is state


@pytest.mark.parametrize(
    ("celsius", "state"), [(70.0, NOMINAL), (80.0, FAIR), (91.0, SERIOUS), (101.0, CRITICAL)]
)
def test_a_zone_with_a_critical_point_alone(celsius: float, state: ThermalState) -> None:
    assert zone_state(celsius, {"critical": 105.0, "active": 40.0}) is state


def test_a_zone_without_trip_points_says_nothing() -> None:
    assert zone_state(99.0, {}) is UNKNOWN


def zone(folder: Path, number: int, temperature: str, **trips: str) -> None:
    path = folder / f"thermal_zone{number}"
    path.mkdir()
    (path / "temp").write_text(temperature)
    for index, (kind, value) in enumerate(trips.items()):
        (path / f"trip_point_{index}_type").write_text(f"{kind}\n")
        (path / f"trip_point_{index}_temp").write_text(value)


@pytest.fixture
def pressure(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_text(PRESSURE.format(0))
    return path


def test_the_worst_zone_counts(tmp_path: Path, pressure: Path) -> None:
    zone(tmp_path, 0, "41000\n", passive="95000\n", critical="105000\n")
    zone(tmp_path, 1, "96000\n", passive="95000\n", critical="105000\n")
    reading = LinuxSensor(tmp_path, pressure).read()
    assert (reading.thermal, reading.memory) == (SERIOUS, NOMINAL)
    assert not reading.problems


@pytest.mark.parametrize("text", ["", "hot", "-273200", "0", "999999999", "9" * 9000])
def test_a_zone_that_makes_no_sense_is_left_out(tmp_path: Path, pressure: Path, text: str) -> None:
    zone(tmp_path, 0, text, critical="105000")
    assert LinuxSensor(tmp_path, pressure).read().thermal is UNKNOWN
    zone(tmp_path, 1, "50000", critical="105000", passive=text)
    assert LinuxSensor(tmp_path, pressure).read().thermal is NOMINAL


def test_a_machine_without_sensors_is_unknown(tmp_path: Path) -> None:
    reading = LinuxSensor(tmp_path, tmp_path / "absent").read()
    assert reading.state is UNKNOWN
    assert [problem.sensor for problem in reading.problems] == ["thermal", "memory pressure"]


@pytest.mark.parametrize(
    ("stall", "state"), [(0.0, NOMINAL), (19.99, NOMINAL), (20.0, FAIR), (100.0, CRITICAL)]
)
def test_memory_stalls_are_pressure(stall: float, state: ThermalState) -> None:
    assert pressure_state(PRESSURE.format(stall)) is state


@pytest.mark.parametrize("text", ["", "full avg10=", PRESSURE.format(101), "some avg10=9.00 x"])
def test_other_text_is_no_pressure(text: str) -> None:
    with pytest.raises(ValueError, match="full avg10"):
        pressure_state(text)


@pytest.mark.parametrize(
    ("text", "state"),
    [("nominal", NOMINAL), ("  Serious\n", SERIOUS), ("CRITICAL", CRITICAL), ("fair\n", FAIR)],
)
def test_the_file_names_the_state(tmp_path: Path, text: str, state: ThermalState) -> None:
    path = tmp_path / "state"
    path.write_text(text)
    reading = FileSensor(path).read()
    assert reading.state is state
    assert not reading.problems


@pytest.mark.parametrize("content", [b"", b"warm", b"\xff\xfe", b"serious" * 1000])
def test_a_file_that_names_no_state_is_unknown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    reading = FileSensor(path).read()
    assert reading.state is UNKNOWN
    assert "names no state" in reading.problems[0].message


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe"])
def test_what_is_no_file_is_unknown_and_never_waits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    reading = FileSensor(path).read()
    assert reading.state is UNKNOWN
    assert "cannot be read" in reading.problems[0].message


@pytest.mark.parametrize(
    ("platform", "kind"), [("darwin", MacSensor), ("linux", LinuxSensor), ("win32", NoSensor)]
)
def test_the_system_chooses_the_sensor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, kind: type
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert isinstance(open_sensor(None), kind)
    assert isinstance(open_sensor(tmp_path / "state"), FileSensor)


def test_no_sensor_says_so() -> None:
    reading = NoSensor().read()
    assert reading.state is UNKNOWN
    assert reading.problems
