"""Prepares the environment of Ray's processes: loopback, its own token, no proxy in between."""

import json
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from core.cpus import usable_cpus
from core.errors import ImpetusError
from core.keys import key_file
from core.proxies import bypass_proxies
from core.settings import Settings
from core.units import MIB
from deployments.serve import message_size
from deployments.serve.resources import UNIFIED_MEMORY
from scheduler.sensors.machine import machine_memory_bytes

ROOT = Path(__file__).resolve().parents[2]

# Whatever the user's environment says: these keep other machines and other Ray clusters out.
_FORCED = ("RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
# Of another Ray process, or of the user's own cluster.
_DROPPED = ("RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RAYLET_PID", "RAY_NODE_ID")
# Below RAY_TMPDIR, with the longest process id.  Source: sys/un.h, sun_path, 104 bytes on macOS and
# 108 on Linux with the final zero.
_LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1000000/sockets/plasma_store"
# Below TMPDIR, of Ray's dashboard.  Source: CPython, multiprocessing.forkserver.
_LONGEST_LISTENER = "/pymp-12345678/listener-12345678"
_SOCKET_BYTES = {"darwin": 103}
# Would open listeners on every interface, or more of them.
_REFUSED = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS")


def check_ray_environment(environment: Mapping[str, str]) -> None:
    """Raise ImpetusError if a variable of Ray's would expose the server or stop its start."""
    for name in _REFUSED:
        if environment.get(name, "0").lower() not in ("", "0", "false"):
            raise ImpetusError(f"{name} is set; it would listen on every interface. Unset it.")
    _check_folder("RAY_TMPDIR", environment, _LONGEST_SOCKET)
    # Ray takes TMPDIR on Linux; macOS sets it to a folder of 49 bytes.
    is_rays = sys.platform == "linux" and not environment.get("RAY_TMPDIR")
    _check_folder("TMPDIR", environment, _LONGEST_SOCKET if is_rays else _LONGEST_LISTENER)
    if resources := environment.get("RAY_OVERRIDE_RESOURCES"):
        try:
            is_valid = isinstance(json.loads(resources), dict)
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ImpetusError(
                "RAY_OVERRIDE_RESOURCES is not a JSON object with numbers, such as "
                '{"CPU": 4}. Correct it or unset it.'
            )


def _check_folder(name: str, environment: Mapping[str, str], longest: str) -> None:
    """Raise ImpetusError if `longest`, a socket in a temporary folder, had too long a path."""
    length = len(os.fsencode(environment.get(name, "").rstrip("/")))
    most = _SOCKET_BYTES.get(sys.platform, 107) - len(longest)
    if length > most:
        raise ImpetusError(
            f"{name} has a path of {length} bytes, but Ray's sockets there leave {most}. Unset "
            "it, or choose a folder with a shorter path."
        )


def environment(settings: Settings) -> dict[str, str]:
    """Return the server's environment: ours, plus Ray's settings of scripts/env where unset."""
    values = dict(os.environ)
    complete(values, settings)
    return values


def complete(values: MutableMapping[str, str], settings: Settings) -> None:
    """Add to `values` what the server's processes need; see `environment`."""
    # scripts/env has the default; a larger `max_body` raises it.
    values.setdefault(message_size.VARIABLE, str(message_size.message_limit(settings)))
    for name, value in ray_settings().items():
        if name in _FORCED:
            values[name] = value
        else:
            values.setdefault(name, value)
    for name in _DROPPED:
        values.pop(name, None)
    # Absolute: the workers' current folder is another.
    values["IMPETUS_HOME"] = str(settings.home)
    values["RAY_AUTH_TOKEN_PATH"] = str(token_path(settings))
    resources = {"CPU": usable_cpus(), UNIFIED_MEMORY: machine_memory_bytes() // MIB}
    values.setdefault("RAY_OVERRIDE_RESOURCES", json.dumps(resources))
    bypass_proxies(values, settings.host)


def ray_settings() -> dict[str, str]:
    """Return the variables of scripts/env."""
    lines = (ROOT / "scripts" / "env").read_text().splitlines()
    pairs = (line.partition("=") for line in lines if not line.startswith("#"))
    return {name.strip(): value.strip() for name, separator, value in pairs if separator}


def token_path(settings: Settings) -> Path:
    """Return the file of Ray's token; created with access for this user only if missing.

    Raises ImpetusError if the file cannot be created.
    """
    return key_file(settings.home, "ray_token")
