"""Tests of bypassing the environment's proxies for connections to this machine."""

import os
import urllib.request

import pytest

from core.proxies import bypass_proxies


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "a.example"}, "a.example,127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "b, a", "no_proxy": "a"}, "a,b,127.0.0.1,localhost,::1"),
        ({"no_proxy": "localhost"}, "localhost,127.0.0.1,::1"),
    ],
)
def test_this_machine_is_never_asked_through_a_proxy(
    before: dict[str, str], after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"http_proxy": "http://127.0.0.1:9", **before}
    bypass_proxies(values)
    assert {values[name] for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy")} == {after}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert urllib.request.proxy_bypass("127.0.0.1:8000")
    assert not urllib.request.proxy_bypass("example.com")


def test_another_address_of_this_machine_can_be_added() -> None:
    values: dict[str, str] = {}
    bypass_proxies(values, "192.168.1.5")
    assert values["no_proxy"].endswith(",192.168.1.5")
