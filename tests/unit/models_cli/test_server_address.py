"""How scripts find the running server: its address, and the credential that opens it."""

from pathlib import Path

import pytest

from core.keys import MANAGEMENT_TOKEN, read_key
from scripts.connect_lib.__main__ import _own_url
from scripts.server_lib.address import AddressProblem, find_server, normal_root, own_settings


def test_management_token_is_for_the_own_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPETUS_HOME", str(tmp_path))
    monkeypatch.setenv("IMPETUS_PORT", "8123")
    monkeypatch.delenv("IMPETUS_API_KEY", raising=False)
    token = read_key(tmp_path, MANAGEMENT_TOKEN)
    own = find_server(None, None)
    assert (own.root, own.key, own.token, own.is_own) == ("http://127.0.0.1:8123", "", token, True)
    assert token not in repr(own)
    assert find_server("http://localhost:8123/v1", None).token == token
    for url in ("http://127.0.0.1:8124", "http://mac.local:8123", "https://127.0.0.1:8123"):
        other = find_server(url, "a-key")
        assert (other.key, other.token, other.is_own) == ("a-key", "", False)
    # A server that listens everywhere is asked on this machine.
    monkeypatch.setenv("IMPETUS_HOST", "0.0.0.0")
    monkeypatch.setenv("IMPETUS_API_KEY", "canary-key-1234")
    everywhere = find_server(None, None)
    assert (everywhere.root, everywhere.key) == ("http://127.0.0.1:8123", "canary-key-1234")


def test_addresses_are_checked() -> None:
    assert normal_root("http://[::1]:8000/v1/") == "http://[::1]:8000"
    for text in ("localhost:8000", "ftp://x", "http://", "http://a:b"):
        with pytest.raises(AddressProblem, match="not a valid address"):
            normal_root(text)


def test_port_of_the_configuration_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMPETUS_PORT", raising=False)
    config = tmp_path / "serve_config.yaml"
    config.write_text("applications: [{args: {port: 8321}}]")
    monkeypatch.setattr("scripts.connect_lib.__main__.own_settings", lambda: own_settings(config))
    assert find_server(None, None, config).root == "http://127.0.0.1:8321"
    assert _own_url() == "http://127.0.0.1:8321"
    with pytest.raises(AddressProblem, match="cannot be read"):
        find_server(None, None, tmp_path / "none.yaml")
