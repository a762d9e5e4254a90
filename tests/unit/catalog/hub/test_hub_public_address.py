"""Addresses of this machine and its networks are refused, however they are written (D9)."""

import socket

import pytest

from catalog.hub.public_address import Resolve, is_public, parse_address, public_ips, resolve
from core.errors import HubUnavailable, RequestError

PRIVATE = [
    *("0.0.0.0", "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "198.18.0.1", "192.0.2.1", "224.0.0.1", "255.255.255.255"),
    *("240.0.0.1", "::", "::1", "fd00::1", "fe80::1", "fe80::1%eth0", "ff02::1", "2001:db8::1"),
    *("::ffff:10.0.0.1", "::ffff:7f00:1", "64:ff9b::127.0.0.1", "64:ff9b:1::a00:1"),
    *("2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "fec0::1", "nonsense", ""),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]


@pytest.mark.parametrize("ip", PRIVATE)
def test_address_is_private(ip: str) -> None:
    assert not is_public(ip)


@pytest.mark.parametrize("ip", PUBLIC)
def test_address_is_public(ip: str) -> None:
    assert is_public(ip)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/x", "http://2130706433/x", "http://0x7f.1/x", "http://017700000001/x"),
        *("http://[::1]/x", "http://[::ffff:127.0.0.1]/x", "http://localhost/x", "http://0/x"),
        *("http://127.1/x", "https://[fe80::1]/x", "http://[::]/x"),
    ],
)
def test_address_of_this_machine_is_refused_as_the_system_reads_it(url: str) -> None:
    """Numbers in odd forms are whatever the resolver makes of them: it alone is believed."""
    address = parse_address(url)
    with pytest.raises((RequestError, HubUnavailable)):
        public_ips(address, resolve)


def test_address_is_refused_if_one_of_several_is_private() -> None:
    address = parse_address("https://mixed.test/x")
    texts = set()
    for found in (["8.8.8.8", "10.0.0.1"], ["169.254.169.254"], ["::1", "8.8.8.8"]):
        with pytest.raises(RequestError) as problem:
            public_ips(address, lambda _host, _port, found=found: found)  # type: ignore[misc]
        texts.add(problem.value.message)
    # The same words for all: nobody learns what is in this network.
    assert len(texts) == 1
    assert public_ips(address, lambda _host, _port: ["8.8.8.8", "1.1.1.1"]) == [
        "8.8.8.8",
        "1.1.1.1",
    ]


def test_address_without_a_name_behind_it() -> None:
    def fails(_host: str, _port: int) -> list[str]:
        raise socket.gaierror

    look_ups: list[Resolve] = [fails, lambda _host, _port: []]
    for look_up in look_ups:
        with pytest.raises(HubUnavailable, match="cannot be found"):
            public_ips(parse_address("https://none.test/x"), look_up)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://a.test/x", "//a.test/x", "a.test/x", "", "https:///x"),
        *("https://user:key@a.test/x", "https://a.test@10.0.0.1/x", "https://a.test\\@10.0.0.1/"),
        *("https://a.test/x y", "https://a.test/\n", "https://a.test:99999/", "https://[::1/x"),
        *(
            "https://a.test/" + "x" * 5000,
            "gopher://a.test/",
            "data:text/plain,x",
            "https://a\0.b/",
        ),
    ],
)
def test_address_that_programs_read_differently_is_refused(url: str) -> None:
    with pytest.raises(RequestError) as problem:
        parse_address(url)
    assert "key" not in problem.value.message
    assert len(problem.value.message) < 200


def test_address_is_taken_apart() -> None:
    address = parse_address("https://A.test:8443/a/b.gguf?x=1#y")
    assert (address.host, address.port, address.target) == ("a.test", 8443, "/a/b.gguf?x=1")
    assert address.netloc == "a.test:8443"
    assert address.at("2606:4700::1111") == "https://[2606:4700::1111]:8443/a/b.gguf?x=1"
    plain = parse_address("http://a.test")
    assert (plain.netloc, plain.at("8.8.8.8")) == ("a.test", "http://8.8.8.8:80/")
