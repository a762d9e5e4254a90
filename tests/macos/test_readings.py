"""What the server reads of a Mac, through real calls of C functions with macOS' prototypes.

The code runs unchanged in processes whose system, libraries and programs are a fake Mac's.
"""

import sys
from pathlib import Path

import pytest

from core.units import GIB, MIB
from tests.fake_mac.machine import FakeMac

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="this Mac's own libraries answer")

PMSET = """case "$*" in
  '-g') printf 'Currently in use:\\n lowpowermode         1\\n' ;;
  '-g batt') echo "Now drawing from 'Battery Power'"; echo ' -InternalBattery-0 (id=1) 41%; x' ;;
  *) exit 1 ;;
esac"""


@pytest.fixture(scope="module")
def mac(tmp_path_factory: pytest.TempPathFactory) -> FakeMac:
    found = FakeMac(tmp_path_factory.mktemp("mac"))
    found.program("pmset", PMSET)
    found.program("sysctl", '[ "$*" = "-n hw.perflevel0.physicalcpu" ] && echo 6')
    found.program("lsof", "printf 'p812\\ncnode\\nf21\\n'")
    return found


MEMORY = """
from scheduler.sensors.machine import gpu_memory_bytes, machine_memory_bytes, memory_budget_bytes
total, gpu = machine_memory_bytes(), gpu_memory_bytes()
result = total, gpu, memory_budget_bytes(total, gpu)
"""


@pytest.mark.parametrize(
    ("state", "gpu"),
    [
        ({}, 11453251584),
        ({"wired_mib": 13000}, 13000 * MIB),
        ({"no_devices": 1, "working_set": 7 * GIB}, 7 * GIB),
    ],
    ids=["Metal", "wired limit", "default device only"],
)
def test_memory_is_the_kernels_and_metals(mac: FakeMac, state: dict[str, int], gpu: int) -> None:
    """Metal tells nothing before CoreGraphics is loaded."""
    total, found, budget = mac.run(MEMORY, **state)
    assert (total, found) == (16 * GIB, gpu)
    assert total // 4 < budget < gpu


SENSORS = """
import ctypes
from scheduler.sensors.machine import open_sensor
sensor = open_sensor(None)
readings = [sensor.read() for _ in range(3)]
one = readings[0]
problems = [each.message for each in one.problems]
library = ctypes.CDLL(None)
calls = library.fake_registrations(), library.fake_host_references()
levels = one.thermal.name, one.memory.name
result = *levels, one.is_low_power, one.battery, one.available_bytes, problems, calls
"""


@pytest.mark.parametrize(
    ("thermal", "pressure", "names"),
    [
        (0, 1, ["NOMINAL", "NOMINAL"]),
        (1, 2, ["FAIR", "FAIR"]),
        (2, 4, ["SERIOUS", "CRITICAL"]),
        (4, 1, ["CRITICAL", "NOMINAL"]),
    ],
)
def test_heat_pressure_and_power_are_read(
    mac: FakeMac, thermal: int, pressure: int, names: list[str]
) -> None:
    found = mac.run(SENSORS, thermal=thermal, pressure=pressure)
    available = (1000 + 3000 + 2000 // 2) * 16384
    # One registration with notifyd, and one reference to the host, for all readings.
    assert found == [*names, True, 0.41, available, [], [1, 1]]


FOOTPRINTS = """
import os, subprocess, sys
from catalog.convert.memory import process_tree_bytes
from core.process_memory import footprint_bytes
from scheduler.sensors.process_memory import open_meter
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
own, other, tree = open_meter().read(), footprint_bytes(child.pid), process_tree_bytes(os.getpid())
child.communicate(b"\\n")
result = own, other, tree, footprint_bytes(child.pid)
"""


def test_footprints_are_read_of_this_process_and_of_its_children(mac: FakeMac) -> None:
    found = mac.run(FOOTPRINTS, footprint=3 * GIB, others=5 * GIB)
    assert found == [3 * GIB, 5 * GIB, 8 * GIB, None]


THREADS = """
import ctypes
from backends.engine.threads import name_this_thread, performance_cores
from core.stack import _lower_priority
from scheduler.sensors.process_memory import trim_heap
library = ctypes.CDLL(None)
library.fake_thread_name.restype = ctypes.c_char_p
name_this_thread("impetus-model-of-a-user")
_lower_priority()
trim_heap()
name = library.fake_thread_name().decode()
result = name, library.fake_quality(), library.fake_reliefs(), performance_cores()
"""


def test_threads_have_names_and_classes_and_free_memory_goes_back(mac: FakeMac) -> None:
    # Source: sys/qos.h, QOS_CLASS_UTILITY.
    assert mac.run(THREADS) == ["impetus-model-o", 0x11, 1, 6]


FILES = """
import os, plistlib, sys
from pathlib import Path
from core.files import allocate, flush_to_disk
from deployments.start.backups import keep_out_of_backups
from deployments.stderr_tail import stderr_path
cache = Path(os.environ["FAKE_FOLDER"]) / "cache"
keep_out_of_backups(cache)
attribute = (cache / "com.apple.metadata:com_apple_backup_excludeItem").read_bytes()
with (cache / "blocks").open("wb") as file:
    allocate(file.fileno(), 100_000)
    flush_to_disk(file.fileno())
with (cache / "stderr").open("wb") as file:
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    path = stderr_path()
    os.dup2(kept, 2)
result = plistlib.loads(attribute), (cache / "blocks").stat().st_size, path
"""


def test_files_are_kept_out_of_backups_reserved_and_found(mac: FakeMac, tmp_path: Path) -> None:
    long = tmp_path / "a home of mine" / ("n" * 100)
    found = mac.run(FILES, folder=long)
    assert found == ["com.apple.backupd", 100_000, str(long / "cache" / "stderr")]


POOLS = """
import ctypes
from backends.coreml.worker import autorelease_pool
from core.machine import macos_build
library = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
with autorelease_pool():
    inside = library.fake_pools()
result = inside, library.fake_pools(), macos_build()
"""


def test_core_mls_copies_have_a_pool_and_its_cache_the_build_of_macos(mac: FakeMac) -> None:
    assert mac.run(POOLS) == [1, 0, "24G84"]


SYSTEM = """
from backends.apple.backend import system_problem
from core.machine import macos_release
from deployments.replica.accelerator import turn_file
from deployments.router.port_use import listener_name
from pathlib import Path
name = turn_file(Path("/home")).name
problem = system_problem("darwin", macos_release())
result = name, macos_release(), problem, listener_name(8000)
"""


def test_processes_under_two_host_names_share_one_file_of_turns(mac: FakeMac) -> None:
    first = mac.run(SYSTEM, node="mac.local")
    second = mac.run(SYSTEM, node="dhcp-17.example.org")
    assert first == second
    assert first[0].startswith("turns-")
    assert first[3] == "node (process 812)"


@pytest.mark.parametrize(
    ("darwin", "macos", "problem"),
    [("24.6.0", 15, "this is 15"), ("25.1.0", 26, ""), ("26.0.0", 27, "")],
)
def test_macos_26_is_seen_by_a_python_that_takes_it_for_16(
    mac: FakeMac, darwin: str, macos: int, problem: str
) -> None:
    found = mac.run(SYSTEM, darwin=darwin, mac_ver="16.0")
    assert found[1] == macos
    assert problem in (found[2] or "")
    assert bool(found[2]) == bool(problem)


HEAVY = """
import os, sys, time
from core.child import Child
child = Child(
    [sys.executable, "-c", "import time; time.sleep(60)"], {}, answer_limit_bytes=100,
    memory_limit_bytes=1_000_000,
)
try:
    child.read(1, time.monotonic() + float(os.environ["FAKE_LIMIT_S"]))
    result = "an answer"
except Exception as problem:
    result = type(problem).__name__
child.close()
"""


@pytest.mark.parametrize(
    ("others", "limit_s", "outcome"),
    [(900_000, 0.5, "TimeoutError"), (1_100_000, 30.0, "ChildTookMemory")],
)
def test_a_child_that_holds_too_much_is_ended_by_its_parent(
    mac: FakeMac, others: int, limit_s: float, outcome: str
) -> None:
    assert mac.run(HEAVY, others=others, limit_s=limit_s) == outcome


def test_functions_of_linux_are_not_there(mac: FakeMac) -> None:
    """Otherwise these tests would pass with code that only Linux can run."""
    code = """
import ctypes, os
from core import machine
library = ctypes.CDLL(None)
result = [hasattr(library, name) for name in ("prctl", "unshare", "malloc_trim", "gethostuuid")]
result.append(hasattr(os, "sched_getaffinity"))
"""
    assert mac.run(code) == [False, False, False, True, False]
