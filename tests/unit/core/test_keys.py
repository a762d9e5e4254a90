"""Secret tokens as files: created once, complete, and readable by their owner only."""

import stat
import threading
from pathlib import Path

import pytest

from core.errors import ImpetusError
from core.keys import key_file, read_key


def test_a_key_is_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    path = key_file(tmp_path / "home", "some_token")
    token = read_key(tmp_path / "home", "some_token")
    assert len(token) == 64
    assert path.read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["some_token"]


def test_a_key_that_others_can_read_is_closed_to_them(tmp_path: Path) -> None:
    path = key_file(tmp_path, "token")
    path.chmod(0o644)
    assert read_key(tmp_path, "token") == path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\n"])
def test_a_damaged_key_is_replaced(tmp_path: Path, content: bytes) -> None:
    key_file(tmp_path, "token").write_bytes(content)
    assert len(read_key(tmp_path, "token")) == 64


def test_several_processes_agree_on_one_key(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    tokens: list[str] = []

    def make() -> None:
        start.wait()
        tokens.append(read_key(tmp_path, "token"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 8
    assert len(set(tokens)) == 1


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a file where the folder belongs")
    with pytest.raises(ImpetusError, match="keys/token"):
        read_key(tmp_path, "token")
