"""Probes of step `readings`: the server's own readings, each in a process of its own.

Usage: python -m scripts.doctor_lib.probes NAME
"""

import ctypes
import os
import re
import resource
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
from core.units import GIB, MIB
from scripts.doctor_lib.machine import ROOT
from scripts.doctor_lib.probe_result import Found, print_result
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


def metal() -> Found:
    """Compare Metal's working set as the server reads it with the one that MLX reads.

    Also tells whether a process gets a default device before CoreGraphics is loaded.
    """
    # Before any import that loads CoreGraphics.
    has_device = _has_default_device()

    import mlx.core as mx

    from scheduler.sensors.macos_memory import MacLimits

    own = MacLimits().gpu_bytes() or 0
    other = int(mx.device_info()["max_recommended_working_set_size"])
    bare = "a" if has_device else "no"
    value = f"{own / GIB:.2f} GiB; MLX {other / GIB:.2f} GiB; {bare} device without CoreGraphics"
    is_near = abs(own - other) < MIB or MacLimits().wired_limit_bytes() is not None
    return Found(value, "" if is_near else "The two differ.", "send the report", WARN)


def _has_default_device() -> bool:
    library = ctypes.CDLL("/System/Library/Frameworks/Metal.framework/Metal")
    library.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
    return bool(library.MTLCreateSystemDefaultDevice())


def open_file_path() -> Found:
    """Ask the system for the path of an open file, as the tail of a process's errors does."""
    import fcntl

    with tempfile.NamedTemporaryFile(prefix="impetus-doctor-") as file:
        # Source: fcntl(2) of macOS, F_GETPATH, at most 1024 bytes.
        answer = fcntl.fcntl(file.fileno(), 50, bytes(1024)).rstrip(b"\0")
        is_same = os.path.realpath(file.name) == os.path.realpath(os.fsdecode(answer))
    return Found("told", "" if is_same else "The path is another one.", "send the report", WARN)


def footprint() -> Found:
    """Compare this process's memory as the server measures it with the system's number."""
    from scheduler.sensors.process_memory import open_meter

    held = bytearray(64 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    own = open_meter().read() or 0
    if sys.platform == "darwin":
        done = subprocess.run(
            ["/usr/bin/footprint", "-p", str(os.getpid())],
            capture_output=True,
            text=True,
            check=False,
        )
        other = _footprint_bytes(done.stdout)
    else:
        other = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    value = f"{own / MIB:.0f} MiB; the system says {other / MIB:.0f} MiB"
    is_near = own > len(held) and (not other or abs(own - other) < 0.25 * other)
    return Found(value, "" if is_near else "The two differ.", "send the report", WARN)


def _footprint_bytes(text: str) -> int:
    """Return the footprint that footprint(1) prints, 0 if it prints none."""
    match = re.search(r"Footprint:\s*([\d.]+)\s*(KB|MB|GB)", text)
    if match is None:
        return 0
    return int(float(match[1]) * {"KB": 2**10, "MB": 2**20, "GB": 2**30}[match[2]])


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

    return Found(f"{performance_cores()} threads per engine, {usable_cpus()} CPUs")


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
        command = [sys.executable, "-m", "scripts.doctor_lib.probes", _PARTNER, str(path)]
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
        "Metal's working set": metal,
        "path of an open file": open_file_path,
        "memory of a process": footprint,
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
