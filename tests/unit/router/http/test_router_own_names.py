"""The Host header of other machines: this machine's own addresses and names, where a key guards."""

import plistlib
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments.router.credentials import StoredCredentials
from router.app import create_app
from router.http.own_names import names_this_machine
from tests.fakes import make_services
from tests.live_server import exchange, serving

KEY = "canary-key-1234"


@pytest.fixture(autouse=True)
def _host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Studio.example.org")


@pytest.mark.parametrize(
    ("name", "address", "is_own"),
    [
        ("192.168.0.7", "192.168.0.7", True),
        ("192.168.0.8", "192.168.0.7", False),
        ("192.168.0.7", "::ffff:192.168.0.7", True),
        ("fe80::1", "fe80::1%en0", True),
        ("fe80:0::1", "fe80::1", True),
        ("fe80::2", "fe80::1%en0", False),
        ("192.168.0.7.nip.io", "192.168.0.7", False),
        ("3232235527", "192.168.0.7", False),
        ("0xc0a80007", "192.168.0.7", False),
        ("192.168.7", "192.168.0.7", False),
        ("studio.example.org", "10.0.0.1", True),
        ("studio", "10.0.0.1", True),
        ("studio.local", "10.0.0.1", True),
        ("studio.evil.com", "10.0.0.1", False),
        ("example.org", "10.0.0.1", False),
        ("", "10.0.0.1", False),
        ("10.0.0.1", "/tmp/socket", False),
    ],
)
def test_own_addresses_and_names_are_told_from_others_n3(
    name: str, address: str, is_own: bool
) -> None:
    assert names_this_machine(name, (address, 8000)) is is_own


def settings_of_macos(path: Path, name: object) -> None:
    path.write_bytes(
        plistlib.dumps({"System": {"Network": {"HostNames": {"LocalHostName": name}}}})
    )


def test_a_mac_has_its_name_in_multicast_dns_whatever_its_router_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gethostname` then tells the name that DHCP gave, as on many home networks."""
    path = tmp_path / "preferences.plist"
    monkeypatch.setattr("router.http.own_names._MACOS_NAMES", path)
    server = ("10.0.0.1", 8000)
    assert not names_this_machine("bobs-macbook-pro.local", server)
    settings_of_macos(path, "Bobs-MacBook-Pro")
    assert names_this_machine("bobs-macbook-pro.local", server)
    assert names_this_machine("studio.local", server)
    for other in ("bobs-macbook-pro", "bobs-macbook-pro.evil.com", "evil.local", ".local"):
        assert not names_this_machine(other, server)
    # It is read again once it has changed.
    settings_of_macos(path, "Renamed-Mac")
    assert names_this_machine("renamed-mac.local", server)
    assert not names_this_machine("bobs-macbook-pro.local", server)
    for content in (b"", b"x" * 100, b"<plist><string>", plistlib.dumps([1]), b"\0" * 2_000_000):
        path.write_bytes(content)
        assert not names_this_machine("renamed-mac.local", server)
    for name in (5, "", "evil.com/", {"a": "b"}):
        settings_of_macos(path, name)
        assert not names_this_machine("evil.com/.local", server)


@pytest.mark.parametrize("server", [None, (), 5, ("", None)])
def test_an_unknown_address_of_the_connection_accepts_no_address(server: Any) -> None:
    assert not names_this_machine("10.0.0.1", server)


def test_a_machine_without_a_name_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    assert not names_this_machine("", None)
    assert not names_this_machine(".local", None)


async def status_of(app: FastAPI, host: str, **headers: str) -> int:
    """Ask over a connection to 192.168.0.7."""

    async def other_machine(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "server": ("192.168.0.7", 8000)}, receive, send)

    transport = httpx.ASGITransport(other_machine)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        return (await http.get("/v1/models", headers={"host": host, **headers})).status_code


@pytest.mark.parametrize("host", ["192.168.0.7:8000", "studio.local:8000", "STUDIO"])
async def test_other_machines_are_answered_where_a_key_guards(host: str) -> None:
    app = create_app(make_services(api_key=KEY, host="0.0.0.0"))
    assert await status_of(app, host) == 401
    assert await status_of(app, host, authorization=f"Bearer {KEY}") == 200
    own_page = {"authorization": f"Bearer {KEY}", "origin": f"http://{host.lower()}"}
    assert await status_of(app, host, **own_page) == 200
    assert await status_of(app, host, **{**own_page, "origin": "http://evil.com"}) == 403


async def test_without_a_key_no_other_name_is_accepted_n3(tmp_path: Path) -> None:
    credentials = StoredCredentials(tmp_path / "keys.sqlite")
    app = create_app(replace(make_services(), credentials=credentials))
    assert await status_of(app, "192.168.0.7:8000") == 403
    assert await status_of(app, "studio.local") == 403
    await credentials.create_key("one", ["inference"], None)
    assert await status_of(app, "192.168.0.7:8000") == 401
    assert await status_of(app, "studio.local") == 401
    credentials.close()


async def test_the_listener_tells_the_address_of_the_connection() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del receive
        seen.append(scope["server"][0])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with serving(app) as port:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert (await exchange(port, request))[0] == 204
    assert seen == ["127.0.0.1"]
