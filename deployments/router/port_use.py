"""Finds programs that already answer on a port, also where the system would let us bind it."""

import socket
import subprocess
import sys
from contextlib import suppress

import psutil

_LIMIT_S = 0.5
_LSOF_LIMIT_S = 2.0
_LOOPBACK = ("127.0.0.1", "::1")
# Addresses under which clients on this machine reach the server by 127.0.0.1, ::1 or localhost.
_REACHED_BY_LOOPBACK = ("localhost", "0.0.0.0", "::", *_LOOPBACK)


def answering_address(host: str, port: int) -> str | None:
    """Return the address on which another program takes connections for us; None if none does.

    BSD systems let 127.0.0.1:8000 be bound beside a listener on *:8000, which then silently loses
    its clients; and `localhost` is ::1 for some clients.  `host` is an address of this machine.
    Blocks for at most half a second for each address, as a rule for less than a millisecond.
    """
    asked = _LOOPBACK if host in _REACHED_BY_LOOPBACK else (host,)
    return next((address for address in asked if _answers(address, port)), None)


def _answers(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), _LIMIT_S) as connection:
        # A port for outgoing connections can be connected to itself, without any listener.
        return bool(connection.getsockname() != connection.getpeername())
    return False


def listener_name(port: int) -> str:
    """Return the program that listens on `port`, such as "node (process 812)"; empty if unknown.

    Only the user's own programs are found.  Blocks for up to 2 s on macOS.
    """
    return _from_lsof(port) if sys.platform == "darwin" else _from_sockets(port)


def _from_sockets(port: int) -> str:
    with suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and tuple(each.laddr)[1:] == (port,) and each.pid:
                return f"{psutil.Process(each.pid).name()} (process {each.pid})"
    return ""


def _from_lsof(port: int, program: str = "/usr/sbin/lsof") -> str:
    """Ask lsof, as psutil needs root on macOS.  Source: lsof(8), output for programs."""
    command = [program, "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]
    try:
        asked = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LSOF_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = asked.stdout.decode("utf-8", "replace").splitlines()
    found = {line[0]: line[1:] for line in reversed(lines) if line}
    return f"{found['c']} (process {found['p']})" if {"c", "p"} <= found.keys() else ""
