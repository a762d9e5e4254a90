"""Refuses web addresses that lead to this machine or its networks, before anything is connected.

Sources: the special-purpose registries of IANA, as `ipaddress` has them; RFC 6052 for NAT64.
"""

import ipaddress
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from core.errors import HubUnavailable, RequestError

Resolve: TypeAlias = Callable[[str, int], list[str]]

_LONGEST = 4096
_PORTS = {"http": 80, "https": 443}
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


@dataclass(frozen=True, slots=True)
class WebAddress:
    """A checked address: `text` is as it was given, `target` the path and the query."""

    text: str
    scheme: str
    host: str
    port: int
    target: str

    @property
    def netloc(self) -> str:
        """Host and port as in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def is_one_of(self, hosts: Collection[str]) -> bool:
        """Whether `hosts` has its host, alone or with its port; the case does not matter."""
        bare = f"[{self.host}]" if ":" in self.host else self.host
        known = {host.lower() for host in hosts}
        return not known.isdisjoint({self.host, bare, f"{bare}:{self.port}"})

    def at(self, ip: str) -> str:
        """Return the address with `ip` in place of the host's name."""
        host = f"[{ip}]" if ":" in ip else ip
        return f"{self.scheme}://{host}:{self.port}{self.target}"


def parse_address(text: str) -> WebAddress:
    """Return the parts of an http or https address.  Raises RequestError.

    What different programs read differently is refused: user names, backslashes, control
    characters, spaces.
    """
    is_odd = "\\" in text or any(char.isspace() or not char.isprintable() for char in text)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        is_odd, parts, host, port = True, urlsplit(""), "", None
    if is_odd or len(text) > _LONGEST or parts.scheme not in _PORTS or not host:
        raise RequestError(
            "The address is not one of a file on the web; write https://host/path/file.",
            param="url",
        )
    if "@" in parts.netloc:
        raise RequestError(
            "The address has a user name or a password in it; leave them out.", param="url"
        )
    target = parts.path or "/"
    target += f"?{parts.query}" if parts.query else ""
    return WebAddress(text, parts.scheme, host, port or _PORTS[parts.scheme], target)


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses that the system finds for a host.  Raises OSError, UnicodeError."""
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def public_ips(
    address: WebAddress, look_up: Resolve = resolve, private_hosts: Collection[str] = ()
) -> list[str]:
    """Return the IP addresses to connect to, in their order; blocks for the name's resolution.

    Raises RequestError if any address of the host is not on the public internet, always in the
    same words, unless `private_hosts` has the host; HubUnavailable for a name that cannot be
    resolved.
    """
    try:
        found = look_up(address.host, address.port)
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise HubUnavailable(
            f"The host {address.host[:80]} cannot be found; check the address and the network."
        )
    if not address.is_one_of(private_hosts) and not all(map(is_public, found)):
        raise RequestError(
            "The address leads to this machine or a private network, which is not fetched. "
            "Name its host in IMPETUS_DOWNLOAD_HOSTS, or put the file into a model folder.",
            param="url",
        )
    return found


def is_public(text: str) -> bool:
    """Whether an IP address is on the public internet, also one that has another inside."""
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and any(ip in network for network in _NAT64):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
