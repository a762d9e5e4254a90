"""Probes of step `readings`: the server's own readings, each in a process of its own.

Usage: python -m scripts.doctor_lib.probes.own_readings NAME
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from core.errors import ImpetusError
from core.units import GIB
from scripts.doctor_lib.machine import ROOT
from scripts.doctor_lib.probes.mac_readings import told
from scripts.doctor_lib.probes.result import Found, print_result
from scripts.doctor_lib.row import WARN

_TURNS = 1000
_TURN_LIMIT_S = 20.0
_PARTNER = "turns-partner"


def settings() -> Found:
    """Read the configuration and the environment as a start does."""
    from core.settings import unknown_variables
    from deployments.router.listener import check_exposure
    from deployments.start.checks import read_settings
    from deployments.start.environment import check_ray_environment

    try:
        check_ray_environment(os.environ)
        found = read_settings(ROOT / "serve_config.yaml")
        check_exposure(found)
    except ImpetusError as problem:
        return Found("invalid", problem.message, "correct it, or unset the variable")
    unknown = list(unknown_variables())
    value = f"formats {', '.join(found.formats)}; {'an' if found.api_key else 'no'} API key"
    return Found(value, " ".join(unknown), "unset it" if unknown else "", WARN)


def _others() -> str:
    """Return what other applications leave of a Mac's memory now, as the end of a value."""
    from scheduler.sensors.macos_pages import available_bytes

    if sys.platform != "darwin":
        return ""
    try:
        return f"; other applications leave {available_bytes() / GIB:.1f} GiB"
    except (OSError, AttributeError) as problem:
        return f"; other applications: {problem}"


def budget() -> Found:
    """Return the memory that models may use, and what it was derived from."""
    from deployments.options import machine_budget_bytes
    from scheduler.sensors.machine import gpu_memory_bytes, machine_memory_bytes

    total, gpu, most = machine_memory_bytes(), gpu_memory_bytes(), machine_budget_bytes()
    told = f"{gpu / GIB:.1f} GiB" if gpu else "nothing"
    value = f"{most / GIB:.1f} of {total / GIB:.1f} GiB; the GPU tells {told}{_others()}"
    nothing = sys.platform == "darwin" and not gpu
    problem = "Metal told no working set, so the budget is a guess." if nothing else ""
    return Found(value, problem, "set IMPETUS_MEMORY_BUDGET, such as 8GiB", WARN)


def sensors() -> Found:
    """Read heat, memory pressure and power as the scheduler does."""
    from scheduler.sensors.machine import open_sensor

    reading = open_sensor(None).read()
    missing = "; ".join(f"no {one.sensor}: {one.message}" for one in reading.problems)
    value = f"heat {reading.thermal.label}, memory {reading.memory.label}"
    if sys.platform == "darwin":
        return Found(value, missing, "the server does not slow down by what is missing", WARN)
    return Found(f"{value}; {missing}" if missing else value)


def cores() -> Found:
    """Return how many threads an engine uses by default."""
    from backends.engine.threads import performance_cores
    from core.cpus import usable_cpus

    value = f"{performance_cores()} threads per engine, {usable_cpus()} CPUs"
    fast = told("sysctl", "-n", "hw.perflevel0.physicalcpu") if sys.platform == "darwin" else ""
    if fast.isdigit() and int(fast) != performance_cores():
        return Found(value, f"This Mac has {fast} fast cores.", "send the report", WARN)
    return Found(value)


def inspector() -> Found:
    """Inspect the starter model as the catalog's scan does."""
    from catalog.scan.inspector import Inspector
    from catalog.scan.starters import STARTERS, installed_starter

    starter = installed_starter(STARTERS[0])
    if starter is None:
        return Found("no starter model", "It is not installed.", "scripts/setup torch", WARN)
    examiner = Inspector(["gguf"])
    began = time.monotonic()
    try:
        outcome = examiner.examine(starter.path)
    finally:
        examiner.close()
    seconds = time.monotonic() - began
    if reason := getattr(outcome, "reason", ""):
        cure = "start the server from a terminal of your own, then send the report"
        return Found(type(outcome).__name__, str(reason), cure)
    return Found(f"{type(outcome).__name__} after {seconds:.1f} s")


def templates() -> Found:
    """Render a chat template in its limited process."""
    from backends.prompt.templates import TemplateRenderer

    renderer = TemplateRenderer("{% for m in messages %}{{ m.content }}{% endfor %}")
    began = time.monotonic()
    try:
        text = renderer.render({"messages": [{"role": "user", "content": "a"}]})
    except ImpetusError as problem:
        return Found("failed", problem.message, "send the report")
    finally:
        renderer.close()
    return Found(f"{time.monotonic() - began:.1f} s", "" if text == "a" else f"It gave {text!r}.")


def turns() -> Found:
    """Take turns with a second process through the accelerator's lock; give the time of one."""
    from backends.engine.accelerator_lock import AcceleratorLock

    with tempfile.TemporaryDirectory(prefix="impetus-doctor-") as folder:
        path = Path(folder) / "turns"
        command = [
            sys.executable,
            "-m",
            "scripts.doctor_lib.probes.own_readings",
            _PARTNER,
            str(path),
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as partner:
            lock = AcceleratorLock(path, timeout_s=_TURN_LIMIT_S)
            lock.register()
            end = time.monotonic() + _TURN_LIMIT_S
            while lock.process_count() < 2 and time.monotonic() < end:
                time.sleep(0.05)
            is_shared = lock.process_count() >= 2
            began = time.monotonic()
            for _ in range(_TURNS):
                with lock.hold():
                    pass
            took = (time.monotonic() - began) / _TURNS
            partner.terminate()
        lock.close()
    problem = "" if is_shared else "The second process did not come."
    return Found(f"{took * 1e6:.0f} µs a turn", problem, "send the report", WARN)


def _take_turns(path: Path) -> None:
    from backends.engine.accelerator_lock import AcceleratorLock

    lock = AcceleratorLock(path, timeout_s=_TURN_LIMIT_S)
    lock.register()
    end = time.monotonic() + _TURN_LIMIT_S
    while time.monotonic() < end:
        with lock.hold():
            pass


def unix_socket() -> Found:
    """Listen on a Unix socket where the replicas do."""
    with tempfile.TemporaryDirectory(prefix="impetus-doctor-", dir="/tmp") as folder:
        path = str(Path(folder) / "events")
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
            try:
                listener.bind(path)
                listener.listen(1)
                client.connect(path)
            except OSError as problem:
                return Found(path, f"It cannot be used: {problem.strerror}.", "check /tmp")
    return Found("/tmp can be used")


def busy_port() -> Found:
    """Try to listen on a port of which another program listens on all addresses."""
    from deployments.router.listener import bind

    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen(1)
        port = other.getsockname()[1]
        with suppress(ImpetusError):
            bind("127.0.0.1", port).close()
            cure = "make sure yourself that no other program uses the server's port"
            return Found("taken over", "A port in use counts as free.", cure, WARN)
    return Found("is refused")


PROBES: Mapping[str, Callable[[], Found]] = MappingProxyType(
    {
        "settings": settings,
        "memory budget": budget,
        "sensors": sensors,
        "threads": cores,
        "inspection of a model": inspector,
        "chat template": templates,
        "turns of two processes": turns,
        "Unix socket": unix_socket,
        "port in use": busy_port,
    }
)

if __name__ == "__main__":
    if sys.argv[1] == _PARTNER:
        _take_turns(Path(sys.argv[2]))
    else:
        print_result(PROBES, sys.argv[1])
