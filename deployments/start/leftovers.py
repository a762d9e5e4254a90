"""Ends processes and removes folders that a killed server of this user's has left behind."""

import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from deployments.serve.processes import end_processes, has_owner, own_processes, wait_for_ends

_TMP = Path("/tmp")
_SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_(\d+)")
_REPLICA = "ray::ServeReplica:impetus:"
_MLX = "impetus-mlx-"
_GRACE_S = 3.0
_STRAGGLER_S = 7.0
_ABANDONED_S = 86400.0
_FRESH_S = 60.0


def end_former_servers(*, are_stragglers: bool = False) -> None:
    """End processes of servers whose launcher or `serve run` has died.

    With `are_stragglers`, also wait for replicas that have lost their raylet, and end them.
    """
    left = [one for one, server_id in own_processes() if not has_owner(one, server_id)]
    if are_stragglers:
        orphans = list(_orphans())
        left += wait_for_ends(orphans, _STRAGGLER_S)
    end_processes(left, _GRACE_S)


def _orphans() -> Iterator[psutil.Process]:
    """Yield this user's replicas whose parent is not a raylet."""
    for process in psutil.process_iter():
        try:
            if process.uids().effective != os.geteuid():
                continue
            if " ".join(process.cmdline()).startswith(_REPLICA):
                parent = process.parent()
                if parent is None or "raylet" not in parent.name():
                    yield process
        except (psutil.Error, OSError):
            continue


def remove_former_folders(tmp: Path = _TMP) -> None:
    """Remove temporary folders of servers that have ended; the last Ray session is kept.

    Its logs may say why that server ended.
    """
    ray_folder = Path(os.environ.get("RAY_TMPDIR") or tmp) / "ray"
    for folder in sorted(_ended_sessions(ray_folder), key=lambda path: path.name)[:-1]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in _own_folders(tmp, "impetus-*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _ended_sessions(ray_folder: Path) -> Iterator[Path]:
    """Yield the folders of Ray sessions that served this project and have ended.

    The driver of a `ray start` cluster ends at once, so its raylet tells whether it lives.
    """
    for folder in _own_folders(ray_folder, "session_*"):
        match = _SESSION.fullmatch(folder.name)
        if match is None or _is_driven(folder, int(match[1])):
            continue
        if any(_listens(path) for path in (folder / "sockets").glob("raylet*")):
            continue
        if any((folder / "logs" / "serve").glob("*impetus*")):
            yield folder


def _is_driven(folder: Path, pid: int) -> bool:
    """Return whether the driver that made the session, or perhaps has, still runs."""
    try:
        # A process younger than the folder's last change has got the driver's id.
        return psutil.Process(pid).create_time() <= folder.stat().st_mtime
    except (psutil.NoSuchProcess, OSError):
        return False
    except psutil.AccessDenied:
        return True


def _own_folders(parent: Path, pattern: str) -> Iterator[Path]:
    for path in parent.glob(pattern):
        try:
            found = path.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            yield path


def _is_abandoned(folder: Path) -> bool:
    """Return whether nobody listens on the folder's socket; without one, whether a day passed.

    A folder with other content than this project's may be the user's own.
    """
    path = folder / "events"
    try:
        age_s = time.time() - folder.stat().st_mtime
        if not path.is_socket():
            is_ours = folder.name.startswith(_MLX) or not any(folder.iterdir())
            return is_ours and age_s > _ABANDONED_S
    except OSError:
        return False
    if age_s < _FRESH_S:
        # Its owner may be about to listen.
        return False
    return not _listens(path)


def _listens(path: Path) -> bool:
    """Return whether a process listens on the Unix socket, or perhaps does."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.settimeout(1.0)
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            # The connection may be slow, or the path too long for an address.
            return True
    return True
