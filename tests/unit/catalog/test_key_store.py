"""API keys, sign-in links and sessions in SQLite: hashes only, and no empty file after damage."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from catalog.key_store import MAX_NAME, KeyStore, has_stored_keys
from core.errors import ImpetusError, NotFound, RequestError, Unavailable
from core.keys import api_key_id, hash_api_key

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "api_keys.sqlite"


@pytest.fixture
def keys(path: Path) -> Iterator[KeyStore]:
    store = KeyStore(path)
    yield store
    store.close()


def content_of(path: Path) -> bytes:
    """Return all bytes of the database and its journals."""
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_a_key_is_shown_once_and_stored_as_a_hash(keys: KeyStore, path: Path) -> None:
    key, text = keys.create("laptop", ["inference", "read"], now=10.0, expires_at=20.0)
    assert api_key_id(text.encode()) == key.id
    assert key.scopes == {"inference", "read"}
    assert (key.name, key.created_at, key.expires_at) == ("laptop", 10.0, 20.0)
    assert key.is_valid_at(19.9)
    assert not key.is_valid_at(20.0)
    (stored,) = keys.stored()
    assert stored.key == key
    assert stored.hash == hash_api_key(text.encode(), stored.salt)
    assert stored.hash != hash_api_key(text[:-1].encode() + b"_", stored.salt)
    assert text.rpartition("-")[2].encode() not in content_of(path)


def test_the_file_is_for_its_owner_alone(keys: KeyStore, path: Path) -> None:
    keys.create("one", ["read"], now=1.0)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    keys.close()
    path.chmod(0o644)
    KeyStore(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_revoking_deletes_a_key_and_other_processes_notice(keys: KeyStore, path: Path) -> None:
    other = KeyStore(path)
    key, _ = keys.create("one", ["manage"], now=1.0)
    version = other.data_version()
    assert [stored.key.id for stored in other.stored()] == [key.id]
    keys.revoke(key.id)
    assert other.data_version() != version
    assert other.stored() == []
    for unknown in (key.id, "", "é", "x" * 1000):
        with pytest.raises(NotFound):
            other.revoke(unknown)
    other.close()


def test_the_last_use_never_goes_back(keys: KeyStore) -> None:
    key, _ = keys.create("one", ["manage"], now=1.0)
    keys.record_use({key.id: 7.0, "revoked": 9.0})
    keys.record_use({key.id: 5.0})
    assert [stored.key.last_used_at for stored in keys.stored()] == [7.0]


@pytest.mark.parametrize(
    ("name", "scopes", "expires_at", "param"),
    [
        ("", ["read"], None, "name"),
        (" a", ["read"], None, "name"),
        ("a\nb", ["read"], None, "name"),
        ("a" * (MAX_NAME + 1), ["read"], None, "name"),
        ("a", [], None, "scopes"),
        ("a", ["read", "root"], None, "scopes"),
        ("a", ["read"], 1.0, "expires_at"),
        ("a", ["read"], float("inf"), "expires_at"),
        ("a", ["read"], float("nan"), "expires_at"),
    ],
)
def test_an_invalid_key_is_refused(
    keys: KeyStore, name: str, scopes: list[str], expires_at: float | None, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        keys.create(name, scopes, now=1.0, expires_at=expires_at)
    assert caught.value.param == param
    assert keys.stored() == []


def test_the_number_of_keys_is_limited(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catalog.key_store.MAX_KEYS", 2)
    for name in ("a", "b"):
        keys.create(name, ["read"], now=1.0)
    with pytest.raises(RequestError, match="revoke one first"):
        keys.create("c", ["read"], now=1.0)


def test_a_link_opens_one_session(keys: KeyStore, path: Path) -> None:
    code = keys.create_link_code(now=100.0)
    token = keys.open_session(code, now=200.0)
    assert token is not None
    assert keys.open_session(code, now=200.0) is None
    assert keys.session_end(token) == 200.0 + 7 * 24 * 3600
    assert keys.session_end(code) is None
    assert code.encode() not in content_of(path)
    assert token.encode() not in content_of(path)
    keys.close_session(token)
    assert keys.session_end(token) is None


@pytest.mark.parametrize("code", ["", "x", "é\udc80", "a" * 100_000])
def test_a_code_that_was_never_given_opens_nothing(keys: KeyStore, code: str) -> None:
    keys.create_link_code(now=0.0)
    assert keys.open_session(code, now=0.0) is None


def test_a_link_expires_after_an_hour(keys: KeyStore) -> None:
    code = keys.create_link_code(now=100.0)
    assert keys.open_session(code, now=100.0 + 3600) is None


def test_links_are_limited_and_the_oldest_goes(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catalog.key_store._MAX_LINKS", 2)
    codes = [keys.create_link_code(now=float(at)) for at in range(3)]
    assert [keys.open_session(code, now=5.0) is not None for code in codes] == [False, True, True]


def test_names_with_sql_are_text_s7(keys: KeyStore) -> None:
    names = ["'; DROP TABLE keys; --", '" OR 1=1', "%", "_", "a' UNION SELECT 1"]
    for name in names:
        keys.create(name, ["read"], now=1.0)
    assert sorted(stored.key.name for stored in keys.stored()) == sorted(names)
    for name in names:
        with pytest.raises(NotFound):
            keys.revoke(name)
        assert keys.open_session(name, now=1.0) is None
        assert keys.session_end(name) is None
    assert len(keys.stored()) == len(names)


@pytest.mark.parametrize("content", [b"no database " * 1000, b"SQLite format 3\0" + b"x" * 8192])
def test_a_damaged_file_is_refused_and_stays_s5(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ImpetusError, match="Restore the file"):
        KeyStore(path)
    assert path.read_bytes() == content


def test_a_newer_schema_is_refused_and_stays_s5(keys: KeyStore, path: Path) -> None:
    keys.create("one", ["read"], now=1.0)
    keys.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ImpetusError, match="schema is 99"):
        KeyStore(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM keys").fetchone() == (1,)
    connection.close()


def test_a_locked_file_can_be_read_and_says_so_on_writing_s5(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catalog.connection.BUSY_MS", 50)
    keys = KeyStore(path)
    key, _ = keys.create("one", ["read"], now=1.0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        keys.revoke(key.id)
    assert [stored.key for stored in keys.stored()] == [key]
    other.execute("ROLLBACK")
    other.close()
    keys.revoke(key.id)
    keys.close()


def test_a_read_only_folder_is_told_s5(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ImpetusError, match="cannot be opened"):
        KeyStore(path)


OTHER = """
import sys
from pathlib import Path
from catalog.key_store import KeyStore

store = KeyStore(Path(sys.argv[1]))
store.revoke(sys.argv[2])
store.close()
"""


def test_another_process_that_closes_the_file_leaves_the_journal_of_this_one_s5(
    keys: KeyStore, path: Path
) -> None:
    """The last connection deletes the journal: SQLite must know that this process has others."""
    key, _ = keys.create("one", ["read"], now=1.0)
    second = KeyStore(path)
    assert has_stored_keys(path)
    journal = path.with_name(path.name + "-wal")
    before = journal.stat().st_ino
    command = [sys.executable, "-c", OTHER, str(path), key.id]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert journal.stat().st_ino == before
    assert (keys.stored(), second.stored()) == ([], [])
    second.close()


KILLER = """
import itertools, os, sys
from pathlib import Path
import catalog.key_store as module

module.hash_api_key = lambda text, salt: b"x" * 32
store = module.KeyStore(Path(sys.argv[1]))
for number in itertools.count(int(sys.argv[2])):
    store.create(f"n{number}", ["read"], now=1.0)
    store.open_session(store.create_link_code(now=1.0), now=1.0)
    print(number, flush=True)
"""


def test_kills_lose_no_key_that_was_created_s5(path: Path) -> None:
    KeyStore(path).close()
    committed: set[str] = set()
    for start in range(0, 80, 10):
        command = [sys.executable, "-c", KILLER, str(path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            for _ in range(start % 3 + 1):
                committed.add(f"n{int(process.stdout.readline())}")
            process.send_signal(signal.SIGKILL)
        store = KeyStore(path)
        assert committed <= {stored.key.name for stored in store.stored()}
        store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_what_is_committed_is_on_the_disk_s6(
    path: Path, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    keys = KeyStore(path)
    with keys._reading() as connection:
        values = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "fullfsync", "checkpoint_fullfsync")
        }
    is_mac = int(platform == "darwin")
    assert values == {
        "journal_mode": "wal", "synchronous": 2,
        "fullfsync": is_mac, "checkpoint_fullfsync": is_mac,
    }  # fmt: skip
    keys.close()
