"""The live sockets of the whole process tree: nothing but this machine can connect."""

import ipaddress
import re
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.server import HTTP, STARTER, Server

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
def test_every_socket_is_on_loopback_whatever_the_environment_says_n1(other_server: Server) -> None:
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


# Ray answers 405 to a browser, whatever it sends.
REFUSED = (401, 403, 405)
CONNECT = re.compile(r'(?:connect|sendto|sendmsg|sendmmsg)\(.*?sa_family=AF_INET6?, .*?"([^"]+)"')


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_with_defaults_nothing_but_this_machine_is_connected_to_o6(
    other_server: Server, tmp_path: Path
) -> None:
    """From the start to the end, with every format, the starters and an answered chat."""
    calls = tmp_path / "calls"
    tracing = ("strace", "-f", "--seccomp-bpf", "-qq", "-s", "0", "-o", str(calls))
    other_server.start(
        *tracing,
        *("-e", "trace=connect,sendto,sendmsg,sendmmsg", "--"),
        *(sys.executable, "-m", "deployments.start.launcher"),
    )
    chat = {"model": STARTER, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    answer = HTTP.post(f"{other_server.url}/v1/chat/completions", json=chat, timeout=240)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
    # The first process is strace, which ends with the code of the launcher.
    assert other_server.process is not None
    launcher, *_ = psutil.Process(other_server.process.pid).children()
    launcher.send_signal(signal.SIGINT)
    assert other_server.process.wait(timeout=120) == 0
    with calls.open(errors="replace") as lines:
        addresses = {match[1] for line in lines if (match := CONNECT.search(line))}
    # The server's own parts talk to each other.
    assert "127.0.0.1" in addresses
    assert [address for address in addresses if not is_loopback(address)] == []


def test_rays_job_interface_is_closed_n12(
    other_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the token, and for every browser: nothing is listed, no job is made."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    other_server.start(FORMATS="echo", STARTERS="0")
    processes = processes_of(other_server)
    token_file = next(
        Path(path)
        for process in processes[1:]
        if (path := process.environ().get("RAY_AUTH_TOKEN_PATH"))
    )
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    token = {"authorization": f"Bearer {token_file.read_text().strip()}"}
    ports = {port for _, _, port in listening(processes)} - {other_server.port}
    job = {"entrypoint": "touch /tmp/never"}
    asked = []
    for port in ports:
        url = f"http://127.0.0.1:{port}/api/jobs/"
        try:
            listed = HTTP.get(url, headers=token, timeout=5)
        except httpx.HTTPError:
            # Most of Ray's ports do not speak HTTP.
            continue
        if "json" not in listed.headers.get("content-type", ""):
            # That of metrics.
            continue
        assert listed.status_code == 200
        # Only the server itself, which was not submitted.
        assert [one["type"] for one in listed.json()] == ["DRIVER"]
        browser = {"origin": "http://evil.com", "user-agent": "Mozilla/5.0"}
        for headers in ({}, {"authorization": "Bearer wrong"}, browser, {**token, **browser}):
            assert HTTP.post(url, json=job, headers=headers, timeout=30).status_code in REFUSED
            if not headers.get("user-agent"):
                assert HTTP.get(url, headers=headers, timeout=30).status_code in REFUSED
        assert HTTP.get(url, headers=token, timeout=30).json() == listed.json()
        asked.append(port)
    assert asked
    assert other_server.stop() == 0


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
