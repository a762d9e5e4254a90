"""Tests of the preparation of a deployment's process."""

import importlib
from typing import Any

import pytest

from core.errors import ImpetusError
from deployments.serve.authentication import check_authentication
from deployments.serve.worker import keep_on_loopback

replica: Any = importlib.import_module("ray.serve._private.replica")


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that Serve's replica binds."""
    addresses: list[str] = []

    def add_port(server: Any, address: str) -> int:
        del server
        addresses.append(address)
        return 1

    monkeypatch.setattr(replica, "add_port_to_grpc_server", add_port)
    return addresses


@pytest.mark.parametrize(
    ("node", "address"),
    [("127.0.0.1", "127.0.0.1:0"), ("::1", "[::1]:0"), ("192.168.1.5", "[::]:0")],
)
def test_serves_own_listener_is_on_the_nodes_loopback(
    bound: list[str], node: str, address: str
) -> None:
    for _ in range(2):
        keep_on_loopback(node)
    # What `Replica._on_initialized` calls.
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 1
    replica.add_port_to_grpc_server(None, "10.0.0.1:5")
    assert bound == [address, "10.0.0.1:5"]


def test_a_cluster_without_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ray._private.authentication.authentication_utils.is_token_auth_enabled"
    monkeypatch.setattr(name, lambda: True)
    check_authentication()
    monkeypatch.setattr(name, lambda: False)
    with pytest.raises(ImpetusError, match="RAY_AUTH_MODE=token"):
        check_authentication()
