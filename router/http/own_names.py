"""Tells whether a Host header names this machine: its host name, or the address connected to."""

import ipaddress
import os
import plistlib
import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

_MACOS_NAMES = Path("/Library/Preferences/SystemConfiguration/preferences.plist")
_LABEL = re.compile(r"[A-Za-z0-9-]{1,63}", re.ASCII)
_MAX_SETTINGS_BYTES = 1 << 20


def names_this_machine(name: str, server: Any) -> bool:
    """Return whether `name`, lower-case and without port or brackets, means this machine.

    `server` is ASGI's (address, port) of the connection's own end: a client that connected to an
    address names it, so no list of addresses can be out of date.  The host name is read at each
    call, which takes a microsecond, because macOS changes it with the network.
    """
    try:
        given = _plain(name)
    except ValueError:
        return name in _host_names()
    try:
        return server is not None and given == _plain(str(server[0]))
    except (ValueError, LookupError, TypeError):
        return False


def _host_names() -> frozenset[str]:
    """Return the host name, whole and without its domain, and its names in multicast DNS."""
    whole = socket.gethostname().lower()
    short = whole.partition(".")[0]
    names = {whole, short, f"{short}.local", f"{_macos_name().lower()}.local"}
    return frozenset(names - {"", ".local"})


def _macos_name() -> str:
    """Return a Mac's name in multicast DNS, empty elsewhere; a stat of a file if it is known.

    On macOS the host name may be the one that DHCP gave.  Source: SCDynamicStoreCopyLocalHostName,
    which reads this setting.
    """
    try:
        status = os.stat(_MACOS_NAMES)
        return _name_in(_MACOS_NAMES, status.st_mtime_ns, status.st_size)
    except OSError:
        return ""


@lru_cache(maxsize=1)
def _name_in(path: Path, _changed_ns: int, size: int) -> str:
    """Return the name in a settings file, empty if it has none."""
    if size > _MAX_SETTINGS_BYTES:
        return ""
    try:
        name = plistlib.loads(path.read_bytes())["System"]["Network"]["HostNames"]["LocalHostName"]
    except (OSError, ValueError, LookupError, TypeError, ExpatError, RecursionError):
        return ""
    return name if isinstance(name, str) and _LABEL.fullmatch(name) else ""


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address without the zone of a link; an IPv4 address is one in IPv6's form too."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
