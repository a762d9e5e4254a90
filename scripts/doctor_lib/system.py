"""Step `system`: what holds for every system, from the processor to the server's port."""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from scripts.doctor_lib.machine import Machine, existing
from scripts.doctor_lib.row import FAIL, OK, WARN, Row, judged

_GIB = 2**30
_LEAST_MEMORY_BYTES = 4 * _GIB
_SMALL_MEMORY_BYTES = int(8.5 * _GIB)
# What `scripts/setup torch` writes, compiled wheel included, and room for logs and a model.
_SET_UP_BYTES = 8 * _GIB
_LEAST_FREE_BYTES = 1 * _GIB
_LITTLE_FREE_BYTES = 5 * _GIB
# Source: sys/un.h, sun_path: 104 bytes on macOS, 108 on Linux, with the final zero.
_SOCKET_BYTES = {"darwin": 103}
_SOCKET = "ray/session_2026-01-01_00-00-00_000000_1000000/sockets/plasma_store"
_LEAST_FILES = 4096
# Ray's, which would listen on every interface; deployments.start.environment refuses them.
_REFUSED = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS")
_ANSWER_LIMIT_S = 2.0
_LIST_LIMIT_S = 10.0
# What mount(8) prints: `disk on /point (apfs, local)` on macOS, `disk on /point type ext4 (rw)`.
_MOUNT = re.compile(r"^.+? on (.+?)(?: type (\S+))? \(([^()]*)\)$", re.MULTILINE)
_UNFIT_FILE_SYSTEMS = frozenset(
    (
        *("exfat", "msdos", "vfat", "ntfs", "ntfs3", "fuseblk", "macfuse"),
        *("smbfs", "cifs", "nfs", "nfs4", "afpfs", "webdav", "9p"),
    )
)
DEFAULT_PORT = 8000


def rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of every system; reads only, and opens connections to this machine."""
    done = machine.run("sh", "scripts/system_problem")
    told = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield judged("system", told, done.text if done.code else "", "see docs/macos.md")
    yield _memory(machine)
    yield from _disk(machine)
    yield _data_folder(machine)
    yield _file_system(machine)
    yield _model_folders(machine)
    yield _socket_path(machine)
    yield _open_files()
    yield _ray_variables(machine)
    yield _port(machine)
    yield Row("uptime", OK, machine.run("uptime").text)


def _memory(machine: Machine) -> Row:
    total = machine.memory_bytes()
    value = f"{total / _GIB:.1f} GiB"
    if 0 < total < _LEAST_MEMORY_BYTES:
        return judged("memory", value, "The server and a small model need 4 GiB.")
    little = "Little for a model beside the system." if 0 < total < _SMALL_MEMORY_BYTES else ""
    return judged("memory", value, little, "use small models, such as 1B in Q4", WARN)


def _disk(machine: Machine) -> Iterator[Row]:
    wanted = _LEAST_FREE_BYTES if machine.is_set_up else _SET_UP_BYTES
    # Ray's sockets and logs are in one folder, temporary files of programs in another on a Mac.
    temporary = Path(machine.environment.get("TMPDIR") or machine.temporary)
    for what, folder, least in (
        ("free disk, packages", machine.root, wanted),
        ("free disk, data", machine.data_folder, _LEAST_FREE_BYTES),
        ("free disk, Ray", machine.temporary, _LEAST_FREE_BYTES),
        ("free disk, temporary", temporary, _LEAST_FREE_BYTES),
    ):
        free = machine.free_bytes(folder)
        value = f"{free / _GIB:.1f} GiB"
        if free < least:
            cure = f"free {(least - free) / _GIB:.1f} GiB where {folder} is"
            yield judged(what, value, f"At least {least / _GIB:.0f} GiB are needed.", cure)
        else:
            little = "Little for models and caches." if free < _LITTLE_FREE_BYTES else ""
            yield judged(what, value, little, f"free some where {folder} is", WARN)


def _data_folder(machine: Machine) -> Row:
    folder = machine.data_folder
    found = existing(folder)
    problem = ""
    if not found.is_dir():
        problem = f"{found} is a file."
    elif not os.access(found, os.W_OK | os.X_OK):
        problem = f"{found} cannot be written to."
    cure = "set IMPETUS_HOME to a folder that you can write to"
    return judged("data folder", folder, problem, cure)


def _file_system(machine: Machine) -> Row:
    """Tell the data folder's file system, and whether names differ where only the case does."""
    folder = existing(machine.data_folder)
    other = str(folder).swapcase()
    try:
        is_same = os.path.samefile(other, folder)
    except OSError:
        is_same = False
    kind = file_system(machine, folder)
    value = f"{kind or 'unknown'}, case {'does not count' if is_same else 'counts'} in names"
    is_unfit = kind.lower() in _UNFIT_FILE_SYSTEMS
    problem = f"Locks and databases are not safe on {kind}." if is_unfit else ""
    cure = "set IMPETUS_HOME to a folder on a disk of this machine"
    return judged("file system", value, problem, cure, WARN)


def file_system(machine: Machine, folder: Path) -> str:
    """Return the type of the file system of `folder`, such as apfs; empty if unknown."""
    line = machine.run("df", "-P", str(folder)).last_line
    point = line.split(None, 5)[-1] if line.count(" ") >= 5 else ""
    for name, linux_type, options in _MOUNT.findall(machine.run("mount").text):
        if name == point:
            return str(linux_type or options.partition(",")[0])
    return ""


def _model_folders(machine: Machine) -> Row:
    """List each folder of models in a process: a network folder may not answer."""
    named = machine.environment.get("IMPETUS_MODELS_PATH", "").split(os.pathsep)
    folders = [os.path.expanduser(name) for name in named if name.strip()]
    own = machine.data_folder / "models"
    if os.path.lexists(own):
        folders.append(str(own))
    for folder in folders:
        done = machine.run("ls", "-f", os.path.join(folder, "."), limit_s=_LIST_LIMIT_S)
        if not done.code:
            continue
        cure = "correct IMPETUS_MODELS_PATH, or the folder's rights"
        if machine.is_mac and "not permitted" in done.text:
            cure = "System Settings, Privacy & Security, Files and Folders: allow your terminal"
        reason = done.last_line.rpartition(": ")[2] if done.text else f"Listing it {done.ended}"
        return judged("model folders", folder, f"It cannot be read: {reason}.", cure, WARN)
    return Row("model folders", OK, ", ".join(folders) or "none besides the data folder's")


def _socket_path(machine: Machine) -> Row:
    most = _SOCKET_BYTES.get(machine.system, 107)
    length = len(os.fsencode(str(machine.temporary / _SOCKET)))
    problem = "" if length <= most else f"Ray's socket would have a path over {most} bytes."
    return judged("path of Ray's socket", f"{length} bytes", problem, "unset RAY_TMPDIR")


def _open_files() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_low = hard not in (resource.RLIM_INFINITY, -1) and hard < _LEAST_FILES
    problem = f"Processes may open at most {hard} files." if is_low else ""
    return judged("open files", f"{soft}, at most {hard}", problem, "ulimit -Hn 65536", WARN)


def _ray_variables(machine: Machine) -> Row:
    names = [name for name in sorted(machine.environment) if name.startswith("RAY_")]
    refused = [
        name
        for name in _REFUSED
        if machine.environment.get(name, "0").lower() not in ("", "0", "false")
    ]
    problem = f"{refused[0]} would let Ray listen on every interface." if refused else ""
    cure = f"unset {refused[0]}" if refused else ""
    return judged("Ray's variables", ", ".join(names) or "none", problem, cure)


def _port(machine: Machine) -> Row:
    text = machine.environment.get("IMPETUS_PORT", str(DEFAULT_PORT))
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        return judged("port", text, "IMPETUS_PORT is not a port.", "unset IMPETUS_PORT", FAIL)
    port = int(text)
    hosts = [host for host in ("127.0.0.1", "::1") if _answers(host, port)]
    if not hosts:
        return judged("port", f"{port} is free", "")
    if _is_impetus(hosts[0], port):
        return judged(
            "port", f"{port}", "This server runs already.", "Ctrl-C in its terminal stops it", WARN
        )
    problem = f"Another program listens on port {port} of {' and '.join(hosts)}."
    return judged("port", text, problem, f"IMPETUS_PORT={port + 10} scripts/serve")


def _answers(host: str, port: int) -> bool:
    """Connect first: on a Mac binding works beside a program that listens on all addresses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.settimeout(_ANSWER_LIMIT_S)
            return probe.connect_ex((host, port)) == 0
    except OSError:
        return False


def _is_impetus(host: str, port: int) -> bool:
    address = f"http://[{host}]:{port}/healthz" if ":" in host else f"http://{host}:{port}/healthz"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=_ANSWER_LIMIT_S) as answer:
            return str(answer.headers.get("x-request-id", "")).startswith("req_")
    except urllib.error.HTTPError as problem:
        return str(problem.headers.get("x-request-id", "")).startswith("req_")
    except Exception:
        return False
