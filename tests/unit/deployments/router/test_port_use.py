"""A port on which another program answers is in use, whatever the system lets us bind."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.router import port_use
from deployments.router.listener import PortInUse, bind
from deployments.router.port_use import answering_address, listener_name


@pytest.fixture
def bsd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a port be bound beside a listener on all addresses, as BSD's SO_REUSEADDR does.

    Linux lets two sockets of one user do so with SO_REUSEPORT.
    """
    monkeypatch.setattr("socket.SO_REUSEADDR", socket.SO_REUSEPORT)


def listener_on(host: str) -> socket.socket:
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        found.bind((host, 0))
    except OSError:
        found.close()
        pytest.skip(f"this machine has no {host}")
    found.listen()
    return found


@pytest.fixture(params=["0.0.0.0", "::", "127.0.0.1", "::1"])
def other(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with listener_on(request.param) as found:
        yield found


@pytest.mark.usefixtures("bsd")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_listener_on_another_address_is_found_before_its_clients_are_taken(
    host: str, other: socket.socket
) -> None:
    port = other.getsockname()[1]
    with pytest.raises(PortInUse, match=f"Port {port} on .* is in use by .*IMPETUS_PORT") as caught:
        bind(host, port)
    assert f"process {os.getpid()}" in str(caught.value)


def test_a_port_without_a_listener_is_free() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert answering_address("127.0.0.1", bound.getsockname()[1]) is None


def test_a_connection_to_itself_is_no_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_: tuple[str, int], limit_s: float) -> socket.socket:
        itself = socket.socket()
        itself.bind(("127.0.0.1", 0))
        itself.settimeout(limit_s)
        itself.connect(itself.getsockname())
        return itself

    monkeypatch.setattr("socket.create_connection", connect)
    assert answering_address("127.0.0.1", 8000) is None


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("p812\ncnode\nf23\n", "node (process 812)"),
        ("p812\ncDocker Desktop\nf9\np900\ncother\nf7\n", "Docker Desktop (process 812)"),
        ("", ""),
    ],
)
def test_lsof_names_the_program(output: str, name: str, tmp_path: Path) -> None:
    program, asked = tmp_path / "lsof", tmp_path / "asked"
    program.write_text(f"#!/bin/sh\necho \"$@\" >{asked}\nprintf '{output}'\n")
    program.chmod(0o755)
    assert port_use._from_lsof(8000, str(program)) == name
    assert asked.read_text() == "-nP -iTCP:8000 -sTCP:LISTEN -Fpc\n"


def test_without_lsof_the_program_is_unknown(tmp_path: Path) -> None:
    assert port_use._from_lsof(8000, str(tmp_path / "absent")) == ""


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="other systems refuse the second listener")
def test_this_mac_binds_beside_a_listener_on_all_addresses_and_names_it() -> None:
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        port = everywhere.getsockname()[1]
        assert f"process {os.getpid()}" in listener_name(port)
        with pytest.raises(PortInUse):
            bind("127.0.0.1", port)
