"""Steps `tools` and `pythons`: the compiler, Apple's tools, and the Pythons of this machine."""

from __future__ import annotations

import os
import plistlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.doctor_lib.child import MISSING
from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.row import FAIL, NEEDS_MAC, OK, WARN, Row, judged, skipped

_COMPILE_LIMIT_S = 60.0
_PLAIN = '#include <cstdio>\nint main() { std::puts("works"); }\n'
# CoreGraphics first: without it a command line program gets no default device.
_METAL = """#import <CoreGraphics/CoreGraphics.h>
#import <Metal/Metal.h>
#import <MetalKit/MetalKit.h>
#include <cstdio>
int main() {
  @autoreleasepool {
    CGMainDisplayID();
    id<MTLDevice> device = MTLCreateSystemDefaultDevice();
    unsigned long long bytes = [device recommendedMaxWorkingSetSize];
    const char *name = device ? [[device name] UTF8String] : "no Metal device";
    std::printf("%s, working set %llu MiB\\n", name, bytes >> 20);
  }
}
"""
_FRAMEWORKS = tuple(
    part
    for name in ("Metal", "MetalKit", "Foundation", "CoreGraphics")
    for part in ("-framework", name)
)
_OLDEST_XCODE = 26


def rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of the compiler; never starts a tool of Apple's that opens a dialogue."""
    has_tools = True
    if machine.is_mac:
        row, has_tools = _apple_tools(machine)
        yield row
        yield _xcode(machine)
        yield _sdk(machine, has_tools)
        yield _homebrew(machine)
    else:
        for what in ("Apple's tools", "Xcode", "SDK", "Homebrew"):
            yield skipped(what, NEEDS_MAC)
    if has_tools:
        yield _compiler(machine)
    else:
        yield skipped("C++ compiler", "without Apple's tools it would only open a dialogue")


def _apple_tools(machine: Machine) -> tuple[Row, bool]:
    done = machine.run("xcode-select", "-p")
    what, state = "Apple's tools", WARN if machine.is_set_up else FAIL
    if done.code:
        cure = "xcode-select --install"
        return judged(what, "none", "llama.cpp cannot be compiled.", cure, state), False
    if not os.path.isdir(done.text):
        problem = f"{done.text}, which is selected, does not exist."
        return judged(what, done.text, problem, "sudo xcode-select --reset", state), False
    return Row(what, OK, done.text), True


def _xcode(machine: Machine) -> Row:
    """Read Xcode's version from its file: starting xcodebuild may open a dialogue."""
    folder = Path(machine.run("xcode-select", "-p").last_line or "/")
    try:
        with (folder.parent / "version.plist").open("rb") as file:
            version = str(plistlib.load(file)["CFBundleShortVersionString"])
    except (OSError, ValueError, KeyError, plistlib.InvalidFileException):
        return Row("Xcode", OK, "not selected; only Apple's own model needs it")
    major = re.match(r"\d+", version)
    is_old = major is None or int(major[0]) < _OLDEST_XCODE
    note = "; Apple's own model needs Xcode 26" if is_old else ""
    return Row("Xcode", OK, version + note)


def _sdk(machine: Machine, has_tools: bool) -> Row:
    if not has_tools:
        return skipped("SDK", "without Apple's tools it would only open a dialogue")
    done = machine.run("xcrun", "--show-sdk-version")
    return Row("SDK", OK, f"macOS {done.last_line}" if not done.code else f"xcrun {done.ended}")


def _homebrew(machine: Machine) -> Row:
    """Tell where Homebrew is; its OpenMP could come into a process beside PyTorch's."""
    prefixes = (machine.top / "opt" / "homebrew", machine.top / "usr" / "local")
    brew = next((str(one) for one in prefixes if (one / "bin" / "brew").exists()), "none")
    places = [one / "opt" / "libomp" for one in prefixes]
    places += [machine.top / "opt" / "local" / "lib" / "libomp", prefixes[1] / "lib/libomp.dylib"]
    found = [str(one) for one in places if one.exists()]
    return Row("Homebrew", OK, f"{brew}; libomp: {', '.join(found) or 'none'}")


def _compiler(machine: Machine) -> Row:
    what, state = "C++ compiler", WARN if machine.is_set_up else FAIL
    name = machine.environment.get("CXX") or "c++"
    with tempfile.TemporaryDirectory(prefix="impetus-doctor-") as folder:
        source = Path(folder, "probe.mm" if machine.is_mac else "probe.cpp")
        source.write_text(_METAL if machine.is_mac else _PLAIN)
        program = str(Path(folder, "probe"))
        flags = _FRAMEWORKS if machine.is_mac else ()
        done = machine.run(name, str(source), "-o", program, *flags, limit_s=_COMPILE_LIMIT_S)
        if done.code:
            return _broken_compiler(what, name, done.text, done.ended, state, done.code == MISSING)
        ran = machine.run(program, limit_s=_COMPILE_LIMIT_S)
    problem = ran.ended and f"What it compiled {ran.ended}."
    if "no Metal device" in ran.text:
        problem = "Programs get no Metal device, so models run on the CPU only."
    return judged(what, ran.last_line or ran.ended, problem, "update the compiler", WARN)


def _broken_compiler(
    what: str, name: str, text: str, ended: str, state: str, is_missing: bool
) -> Row:
    if is_missing:
        cure = "for example: apt-get install build-essential"
        return judged(what, "none", f"{name} was not found; llama.cpp needs it.", cure, state)
    if "license" in text:
        problem = "Xcode's licence has not been accepted."
        return judged(what, name, problem, "sudo xcodebuild -license accept", state)
    lines = text.splitlines() or ["it says nothing"]
    told = next((line for line in lines if "error" in line), lines[-1])
    return judged(what, name, f"{name} {ended}: {told[:300]}", "install a working compiler", state)


def python_rows(machine: Machine) -> Iterator[Row]:
    """Yield one row for the Python that is used or would be, and one for all that were found."""
    listed = machine.run("sh", "scripts/find_python", "--list", limit_s=60.0)
    yield _python(machine)
    fit = [line.split("\t") for line in listed.text.splitlines() if line.count("\t") == 3]
    told = (" ".join(filter(None, each)) for each in fit)
    yield Row("Pythons found", OK, "; ".join(dict.fromkeys(told)) or "none")


def _python(machine: Machine) -> Row:
    python, cure = str(machine.python), _NEW_ENVIRONMENT
    if not machine.is_set_up:
        done = machine.run("sh", "scripts/find_python", limit_s=60.0)
        if done.code:
            return judged("Python", "none", done.text)
        python, cure = done.last_line, "name another: PYTHON=/path/to/python3.12 scripts/setup"
    done = machine.run(python, "-c", _ABOUT, limit_s=30.0)
    if done.code:
        problem = f"{python} {done.ended}: {done.last_line[-200:]}"
        return judged("Python", "", problem, cure)
    value = done.text if machine.is_set_up else f"{python}: {done.text}"
    sqlite = re.search(r"SQLite (\d+)\.(\d+)", done.text)
    is_old = sqlite is not None and (int(sqlite[1]), int(sqlite[2])) < _OLDEST_SQLITE
    problem = "Its SQLite is older than 3.37, which the catalog needs." if is_old else ""
    return judged("Python", value, problem, cure)


# Source: STRICT tables came with SQLite 3.37.
_OLDEST_SQLITE = (3, 37)
_NEW_ENVIRONMENT = "rm -rf .venv, then scripts/setup torch"
_ABOUT = """
import platform, sqlite3, ssl, sys, sysconfig
print(platform.python_version(), platform.machine(), "SQLite", sqlite3.sqlite_version,
      ssl.OPENSSL_VERSION)
if sys.platform == "darwin":
    of = sysconfig.get_config_var
    print("built for macOS", of("MACOSX_DEPLOYMENT_TARGET"), "framework" if of("PYTHONFRAMEWORK")
          else "no framework", "and reads macOS", platform.mac_ver()[0])
"""
