"""Step `system` on macOS: what Apple's tools say; elsewhere each row names why it is skipped."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from core.gpu_failures import is_gpu_panic, reports_since
from core.machine import macos_release_of
from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.row import FAIL, NEEDS_MAC, OK, WARN, Row, judged, skipped

_STATES_SINCE = 15
_OWN_TERMINAL = "start the server from a terminal of your own"
# Source: sandbox-exec(1) ends with EX_OSERR where sandbox_apply is refused.
_NESTED = 71
# Source: OSThermalNotification.h and dispatch/source.h, as in scheduler.sensors.macos.
_HEAT: Mapping[str, str] = MappingProxyType(
    {"0": "nominal", "1": "moderate", "2": "heavy", "3": "trapping", "4": "sleeping"}
)
_PRESSURE: Mapping[str, str] = MappingProxyType({"1": "normal", "2": "warning", "4": "critical"})
_RECENT_S = 30 * 86_400


def rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of a Mac."""
    for what, check in CHECKS.items():
        if not machine.is_mac:
            yield skipped(what, NEEDS_MAC)
        else:
            yield check(machine, what)


def _version(machine: Machine, what: str) -> Row:
    release = machine.run("uname", "-r").text
    told = machine.run("sw_vers", "-productVersion").text
    build = machine.run("sw_vers", "-buildVersion").text
    major = macos_release_of(release)
    value = f"macOS {major} (Darwin {release}); sw_vers says {told or 'nothing'} {build}".rstrip()
    if 0 < major < _STATES_SINCE:
        return judged(what, value, "Core ML language models need macOS 15.", "update macOS", WARN)
    return judged(
        what, value, "" if major else "The release of Darwin could not be read.", "", WARN
    )


def _chip(machine: Machine, what: str) -> Row:
    fast, slow = (machine.sysctl(f"hw.perflevel{level}.physicalcpu") for level in (0, 1))
    brand, model = machine.sysctl("machdep.cpu.brand_string"), machine.sysctl("hw.model")
    return Row(what, OK, f"{brand}, {fast or '?'} fast and {slow or '0'} slow cores, {model}")


def _sandbox(machine: Machine, what: str) -> Row:
    profile = "(version 1)(allow default)"
    done = machine.run("sandbox-exec", "-p", profile, "/usr/bin/true")
    if done.code == _NESTED:
        problem = "This shell is in a sandbox, such as an agent's: files are inspected without one."
        return judged(what, "nested", problem, _OWN_TERMINAL, WARN)
    return judged(what, "works", done.ended and f"sandbox-exec {done.ended}.", "", WARN)


def _firewall(machine: Machine, what: str) -> Row:
    program = machine.top / "usr" / "libexec" / "ApplicationFirewall" / "socketfilterfw"
    state = re.search(r"State = (\d)", machine.run(str(program), "--getglobalstate").text)
    value = {"0": "off", "1": "on", "2": "blocks everything"}.get(state[1] if state else "", "?")
    hint = "" if value == "off" else "; if macOS asks about Python, Deny is fine"
    return Row(what, OK, value + hint)


def _heat(machine: Machine, what: str) -> Row:
    key = "com.apple.system.thermalpressurelevel"
    level = machine.run("notifyutil", "-g", key).last_line.rpartition(" ")[2]
    hot = "The Mac is too warm to measure anything." if level in ("2", "3", "4") else ""
    return judged(what, _HEAT.get(level, f"unknown ({level})"), hot, "let it cool down", WARN)


def _pressure(machine: Machine, what: str) -> Row:
    level = machine.sysctl("kern.memorystatus_vm_pressure_level")
    short = "Memory is short already." if level in ("2", "4") else ""
    return judged(what, _PRESSURE.get(level, f"unknown ({level})"), short, "close programs", WARN)


def _power(machine: Machine, what: str) -> Row:
    battery = machine.run("pmset", "-g", "batt").text
    source = re.search(r"Now drawing from '([^']+)'", battery)
    charge = re.search(r"\s(\d{1,3})%;", battery)
    mode = re.search(
        r"^\s*(?:lowpowermode|powermode)\s+1\s*$", machine.run("pmset", "-g").text, re.M
    )
    value = source[1] if source else "unknown source"
    value += (f", {charge[1]} %" if charge else "") + (", low-power mode" if mode else "")
    slow = "Low-power mode makes models slower." if mode else ""
    return judged(what, value, slow, "turn it off in System Settings, Battery", WARN)


def _wired_limit(machine: Machine, what: str) -> Row:
    text = machine.sysctl("iogpu.wired_limit_mb")
    limit_mib = int(text) if text.isdigit() else 0
    total_mib = machine.memory_bytes() // 2**20
    high = "This leaves the system too little memory." if limit_mib > 0.9 * total_mib else ""
    value = f"{limit_mib:,} MiB" if limit_mib else "the system's default"
    return judged(what, value, high, "sudo sysctl iogpu.wired_limit_mb=0", WARN)


def _crashes(machine: Machine, what: str) -> Row:
    found = list(recent_crashes(machine, time.time() - _RECENT_S))
    gpu = [path for path in found if path.suffix == ".panic" and is_gpu_panic(path)]
    problem = ""
    if gpu:
        problem = f"The GPU's driver stopped this Mac: {gpu[-1].name}. Smaller models, please."
    elif found:
        problem = f"Python or the system crashed: {found[-1].name}."
    cure = "send the newest of them with the report" if found else ""
    return judged(what, f"{len(found)} within 30 days", problem, cure, WARN)


def recent_crashes(machine: Machine, since: float) -> Iterator[Path]:
    """Yield the reports of kernel panics and of crashed Pythons after `since`, oldest first."""
    library = Path("Library", "Logs", "DiagnosticReports")
    folders = {machine.top / library: "*.panic", machine.home / library: "[Pp]ython*.ips"}
    found = (reports_since(folder, pattern, since) for folder, pattern in folders.items())
    yield from (path for _, path in sorted(chain.from_iterable(found)))


def _host_name(machine: Machine, what: str) -> Row:
    done = machine.run("scutil", "--get", "HostName")
    return Row(what, OK, "fixed" if done.code == 0 else "taken from the network, may change")


def _files(machine: Machine, what: str) -> Row:
    most = machine.sysctl("kern.maxfilesperproc")
    low = most.isdigit() and int(most) < 4096
    return judged(what, most, "Too few for the server." if low else "", "restart the Mac", FAIL)


CHECKS: Mapping[str, Callable[[Machine, str], Row]] = MappingProxyType(
    {
        "macOS": _version,
        "chip": _chip,
        "sandbox-exec": _sandbox,
        "firewall": _firewall,
        "heat": _heat,
        "memory pressure": _pressure,
        "power": _power,
        "GPU's wired limit": _wired_limit,
        "panics and crashes": _crashes,
        "host name": _host_name,
        "files per process": _files,
    }
)
