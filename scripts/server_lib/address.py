"""Finds the server's address, and the key or management token that opens it."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from core.errors import ImpetusError
from core.keys import MANAGEMENT_TOKEN, read_key
from core.settings import Settings
from deployments.start.checks import read_settings
from deployments.start.readiness import local_url
from router.clients.problems import ConnectError
from router.clients.target import KEY_VARIABLE
from router.clients.target import normal_root as root_of

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class AddressProblem(Exception):
    """The server's address cannot be told; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A server: `root` is its URL without `/v1`, `key` and `token` are empty if there is none.

    `is_own` tells that it is the server of this machine and this user's settings, whose files it
    sees under the same paths.
    """

    root: str
    key: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    is_own: bool = False


def find_server(url: str | None, key: str | None, config: Path = CONFIG) -> ServerAddress:
    """Return the server at `url`, by default that of the settings.

    The key is `key`, else that of the settings or of IMPETUS_API_KEY.  The management token, which
    the own server has written, is sent to nobody else.  Raises AddressProblem.
    """
    settings = own_settings(config)
    own = local_url(settings)
    root = own if url is None else normal_root(url)
    is_own = _is_same(root, own)
    known = settings.api_key.get_secret_value() if settings.api_key is not None else ""
    found_key = key or os.environ.get(KEY_VARIABLE) or (known if is_own else "")
    return ServerAddress(root, found_key, _token(settings) if is_own else "", is_own)


def own_settings(config: Path = CONFIG) -> Settings:
    """Return the settings that `scripts/serve` starts with.  Raises AddressProblem."""
    try:
        return read_settings(config)
    except ImpetusError as problem:
        raise AddressProblem(problem.message) from problem


def normal_root(text: str) -> str:
    """Return a URL without `/v1` at its end.  Raises AddressProblem unless it is one of HTTP."""
    try:
        return root_of(text)
    except ConnectError as problem:
        raise AddressProblem(str(problem)) from problem


def _is_same(root: str, own: str) -> bool:
    """Whether two URLs name the same port of this machine, or are equal."""
    one, other = urlsplit(root), urlsplit(own)
    if (one.scheme, one.port, one.path) != (other.scheme, other.port, other.path):
        return False
    hosts = {one.hostname, other.hostname}
    return len(hosts) == 1 or hosts <= _LOOPBACK


def _token(settings: Settings) -> str:
    """Return the token that the server has written; empty before it ran, or for another user."""
    if not (settings.home / "keys" / MANAGEMENT_TOKEN).exists():
        return ""
    try:
        return read_key(settings.home, MANAGEMENT_TOKEN)
    except ImpetusError:
        return ""
