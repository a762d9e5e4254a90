"""What the wheels of macOS contain, as far as the server relies on it."""

import re
from pathlib import Path

import pytest

from scripts.install import RUNTIME, read_pins
from tests.macos.mac_packages import MacPackages
from tests.macos.mach_o import ARM64, Slice, read_slices

OLDEST = 14
MIB = 2**20


@pytest.fixture(scope="module")
def installed(packages: MacPackages) -> Path:
    """All packages of a Mac with macOS 14 and Python 3.12, except the one that it compiles."""
    found = packages.resolve(OLDEST, "3.12", extras=("torch",))
    wanted = [f"{name}=={version}" for name, version in found.items() if name != RUNTIME]
    return packages.unpack(OLDEST, "3.12", *wanted)


@pytest.fixture(scope="module")
def binaries(installed: Path) -> dict[str, list[Slice]]:
    """The native files of the packages."""
    files = (path for path in installed.rglob("*") if path.is_file() and not path.is_symlink())
    found = {str(path.relative_to(installed)): read_slices(path) for path in files}
    return {name: slices for name, slices in found.items() if slices}


def test_native_code_is_for_apple_silicon_and_the_oldest_macos(
    binaries: dict[str, list[Slice]],
) -> None:
    assert {"ray/_raylet.so", "mlx/lib/libmlx.dylib", "torch/lib/libomp.dylib"} <= set(binaries)
    unfit = {
        name: [(part.processor, part.macos) for part in slices]
        for name, slices in binaries.items()
        if not any(part.processor == ARM64 and 0 < part.macos <= OLDEST for part in slices)
    }
    assert unfit == {}


def test_native_code_needs_no_libraries_of_homebrew(binaries: dict[str, list[Slice]]) -> None:
    own = ("@", "/usr/lib/", "/System/")
    foreign = {
        (name, library)
        for name, slices in binaries.items()
        for part in slices
        for library in part.libraries
        if library.startswith("/") and not library.startswith(own)
    }
    # The first library that a file names may be itself, as it was built.
    names = {Path(name).name for name in binaries}
    assert {
        (name, library) for name, library in foreign if Path(library).name not in names
    } == set()


def test_there_is_one_openmp_library(installed: Path) -> None:
    found = [str(path.relative_to(installed)) for path in installed.rglob("lib*omp*.dylib")]
    assert found == ["torch/lib/libomp.dylib"]


def test_a_process_of_ray_has_not_loaded_core_graphics(binaries: dict[str, list[Slice]]) -> None:
    """So the memory budget loads it itself before it asks Metal."""
    linked = {one for part in binaries["ray/_raylet.so"] for one in part.libraries}
    assert linked
    assert not [one for one in linked if "CoreGraphics" in one or "AppKit" in one]


def test_ray_neither_kills_by_memory_nor_joins_the_dock(installed: Path) -> None:
    ray = installed / "ray"
    assert b"NoopMemoryMonitor" in (ray / "core/src/ray/raylet/raylet").read_bytes()
    assert b"LSApplication" not in (ray / "_raylet.so").read_bytes()
    for name in ("gcs/gcs_server", "raylet/raylet"):
        assert (ray / "core/src/ray" / name).stat().st_mode & 0o111


def test_mlx_asks_for_all_devices(installed: Path) -> None:
    """Unlike the default device, the list needs no window server."""
    assert b"_MTLCopyAllDevices\0" in (installed / "mlx/lib/libmlx.dylib").read_bytes()


def test_the_event_loop_counts_the_time_asleep(installed: Path) -> None:
    """So deadlines count on `time.monotonic`, see core/awake_time.py."""
    (loop,) = (installed / "uvloop").glob("loop*.so")
    assert b"_mach_continuous_time\0" in loop.read_bytes()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_core_ml_has_its_native_library(python: str, packages: MacPackages) -> None:
    folder = packages.unpack(14, python, f"coremltools=={read_pins('darwin')['coremltools']}")
    library = folder / "coremltools" / "libcoremlpython.so"
    assert ARM64 in [part.processor for part in read_slices(library)]


@pytest.fixture(scope="module")
def metal(packages: MacPackages) -> dict[int, Path]:
    """mlx-metal as macOS 14, 15 and 26 get it, and as 26 does if Python takes it for 16."""
    name = f"mlx-metal=={read_pins('darwin')['mlx-metal']}"
    return {macos: packages.unpack(macos, "3.12", name) for macos in (14, 15, 16, 26)}


def test_macos_26_gets_more_kernels_unless_it_is_taken_for_16(metal: dict[int, Path]) -> None:
    """Why set-up runs pip with SYSTEM_VERSION_COMPAT=0."""
    tags, sizes = {}, {}
    for macos, folder in metal.items():
        (wheel,) = folder.glob("mlx_metal-*.dist-info/WHEEL")
        found = re.search(r"^Tag: .*macosx_(\d+)_0_arm64$", wheel.read_text(), re.MULTILINE)
        assert found
        tags[macos] = int(found[1])
        sizes[macos] = (folder / "mlx/lib/mlx.metallib").stat().st_size
    assert tags == {14: 14, 15: 15, 16: 15, 26: 26}
    assert sizes[26] > sizes[15] + 32 * MIB
