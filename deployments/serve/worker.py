"""Prepares the process of a deployment: logs, a loopback listener, and its end with the raylet."""

import functools
import importlib
import ipaddress
import logging
from collections.abc import Callable
from typing import Any

import ray

from core.parent import exit_with_parent
from deployments.serve.logs import attach_logs

_GRACE_S = 5.0
_EVERY_ADDRESS = "[::]:"

logger = logging.getLogger(__name__)


def prepare_worker() -> None:
    """Prepare this process; each deployment calls it first in its constructor."""
    attach_logs()
    if not ray.is_initialized():
        return
    keep_on_loopback(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    exit_with_parent(_GRACE_S, lambda: logger.error("Ray's raylet ended; this process exits"))


def keep_on_loopback(node_address: str) -> None:
    """Let Serve's gRPC server of this replica listen on `node_address` if that is loopback.

    Serve binds every interface, and unpickles what comes with the token.  Callers use the node's
    address.
    Source: Ray Serve 2.60, `replica.py:Replica._on_initialized`, which runs after the constructor.
    """
    replica: Any = importlib.import_module("ray.serve._private.replica")
    add_port = replica.add_port_to_grpc_server
    if ipaddress.ip_address(node_address).is_loopback and not hasattr(add_port, "__wrapped__"):
        replica.add_port_to_grpc_server = _on_address(add_port, node_address)


def _on_address(
    add_port: Callable[[Any, str], int], node_address: str
) -> Callable[[Any, str], int]:
    host = f"[{node_address}]" if ":" in node_address else node_address

    @functools.wraps(add_port)
    def on_loopback(server: Any, address: str) -> int:
        if address.startswith(_EVERY_ADDRESS):
            address = f"{host}:{address.removeprefix(_EVERY_ADDRESS)}"
        return add_port(server, address)

    return on_loopback
