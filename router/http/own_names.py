"""Tells whether a Host header names this machine: its host name, or the address connected to."""

import ipaddress
import socket
from typing import Any


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
    """Return the host name, whole and without its domain, and its name in multicast DNS."""
    whole = socket.gethostname().lower()
    short = whole.partition(".")[0]
    return frozenset({whole, short, f"{short}.local"} - {"", ".local"})


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address without the zone of a link; an IPv4 address is one in IPv6's form too."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
