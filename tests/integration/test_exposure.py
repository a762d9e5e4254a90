"""The live sockets of the whole process tree: nothing but this machine can connect."""

import ipaddress
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.server import Server

# Nobody listens there: a request through such a proxy would fail.
DEAD_PROXY = "http://127.0.0.1:9"


@pytest.fixture
def exposed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that would open Ray, join another cluster, and use a proxy for everything."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, DEAD_PROXY)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")


def processes_of(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


def listening(processes: list[psutil.Process]) -> Iterator[tuple[str, str, int]]:
    """Yield every listening TCP and every UDP socket: the process, the address and the port."""
    for process in processes:
        try:
            name, connections = process.name(), process.net_connections(kind="inet")
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM:
                yield name, connection.laddr.ip, connection.laddr.port


def socket_folders(processes: list[psutil.Process]) -> set[Path]:
    """Return the folders of this project's unix sockets."""
    paths = {
        Path(str(connection.laddr))
        for process in processes
        if "router" in process.name()
        for connection in process.net_connections(kind="unix")
    }
    return {path.parent for path in paths if path.parent.name.startswith("impetus-")}


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@pytest.mark.usefixtures("exposed_environment")
def test_every_socket_is_on_loopback_whatever_the_environment_says(other_server: Server) -> None:
    other_server.start(FORMATS="echo", STARTERS="0")
    found = list(listening(processes_of(other_server)))
    names = {name for name, _, _ in found}
    # Each kind of process that listens was looked at.
    assert any("raylet" in name for name in names)
    assert any("gcs_server" in name for name in names)
    assert any("router" in name for name in names)
    assert any("scheduler" in name for name in names)
    assert other_server.port in {port for _, _, port in found}
    assert [entry for entry in found if not is_loopback(entry[1])] == []
    for process in processes_of(other_server)[1:]:
        if "raylet" in process.name():
            assert process.environ()["RAY_AUTH_MODE"] == "token"
    folders = socket_folders(processes_of(other_server))
    assert folders
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    assert other_server.stop() == 0
    assert [folder for folder in folders if folder.exists()] == []
    assert other_server.survivors() == []


def test_a_second_server_and_its_end_leave_the_first_alone(
    other_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other_server.start(FORMATS="echo", STARTERS="0")
    second = Server(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("models"))
    try:
        second.start(FORMATS="echo", STARTERS="0")
        first_tree = {process.pid for process in processes_of(other_server)}
        assert first_tree.isdisjoint(process.pid for process in processes_of(second))
        assert second.stop() == 0
        assert second.survivors() == []
    finally:
        second.kill()
    assert other_server.is_running
    other_server.wait_until_ready()
    assert other_server.stop() == 0
