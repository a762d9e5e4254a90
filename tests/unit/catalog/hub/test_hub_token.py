"""The hub's token: order of its sources, file mode, and what is refused (D12)."""

import logging
import stat
from pathlib import Path

import pytest

from catalog.hub.client import HubClient
from catalog.hub.token import HubToken, TokenFile, current_token, owner_of
from core.errors import HubTokenRejected, ImpetusError, RequestError
from scripts.hub_lib.server import Hub
from tests.unit.catalog.hub.conftest import LIMITS

SECRET = "hf_never_shown"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenFile:
    """A home without a token, in an environment without one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("catalog.hub.token.get_token", lambda: None)
    return TokenFile(tmp_path / "home")


def test_hub_token_is_that_of_the_first_source(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert current_token(file) == HubToken("", "")
    monkeypatch.setattr("catalog.hub.token.get_token", lambda: "hf_login")
    assert current_token(file) == HubToken("hf_login", "login")
    file.save(" hf_stored\n")
    assert current_token(file) == HubToken("hf_stored", "stored")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_older")
    assert current_token(file) == HubToken("hf_older", "environment")
    monkeypatch.setenv("HF_TOKEN", "hf_newer")
    assert current_token(file) == HubToken("hf_newer", "environment")
    monkeypatch.setenv("HF_TOKEN", "not a token")
    assert current_token(file).value == "hf_older"


def test_hub_token_file_is_for_its_owner_d12(file: TokenFile, tmp_path: Path) -> None:
    file.save(SECRET)
    path = tmp_path / "home" / "keys" / "hub_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert file.read() == SECRET
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    file.remove()
    file.remove()
    assert file.read() == ""


def test_hub_token_file_that_is_none_is_not_used(
    file: TokenFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "home" / "keys" / "hub_token"
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text(SECRET)
    assert file.read() == ""
    path.unlink()
    for content in (b"\xff\xfe", b"two words", b"", b"x" * 5000):
        path.write_bytes(content)
        assert file.read() == ""
    assert SECRET not in caplog.text


@pytest.mark.parametrize("token", ["", "two words", "x" * 513, "ümlaut", "a\nb", "a\0"])
def test_hub_token_that_is_none_is_refused(file: TokenFile, token: str) -> None:
    with pytest.raises(RequestError, match="1 to 512 characters"):
        file.save(token)
    assert file.read() == ""


def test_hub_token_that_cannot_be_stored(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(ImpetusError, match="could not be stored") as problem:
        TokenFile(tmp_path / "home").save(SECRET)
    assert SECRET not in problem.value.message


def test_hub_login_that_fails_is_no_token(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> str:
        raise OSError(SECRET)

    monkeypatch.setattr("catalog.hub.token.get_token", fails)
    with caplog.at_level(logging.WARNING):
        assert current_token(file) == HubToken()
    assert "hf auth login" in caplog.text
    assert SECRET not in caplog.text + repr(HubToken(SECRET, "login"))


def test_hub_token_has_an_owner(hub: Hub) -> None:
    hub.add_user("me", SECRET)
    assert owner_of(HubClient(hub.endpoint, SECRET, LIMITS)) == "me"
    for token in ("hf_stale", ""):
        with pytest.raises(HubTokenRejected, match="does not know the token"):
            owner_of(HubClient(hub.endpoint, token, LIMITS))
