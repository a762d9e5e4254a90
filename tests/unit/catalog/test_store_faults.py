"""The catalog under faults: a full disk, locks, damage and deletion while it is open, kills."""

import errno
import fcntl
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from catalog.database_errors import failure
from catalog.migrations import move_aside, open_catalog
from catalog.store import CatalogStore
from core.errors import CatalogNotWritten, ImpetusError, Unavailable
from tests.unit.catalog.builders import make_found, write

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def filled(path: Path) -> Iterator[CatalogStore]:
    """A catalog that is larger than SQLite's cache of pages."""
    store = CatalogStore(path)
    large = "{{ messages }}" * 8000
    found = (make_found(f"/m/{n}.gguf", name=f"n{n}", chat_template=large) for n in range(60))
    write(store, *found)
    store.close()
    opened = CatalogStore(path)
    yield opened
    opened.close()


def limited(path: Path, pages: int = 40) -> sqlite3.Connection:
    """Open the catalog with so few pages to come that SQLite says the disk is full."""
    connection = open_catalog(path)
    (count,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {count + pages}")
    return connection


def test_a_full_disk_ends_no_reads_and_is_over_when_there_is_room_s5(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = CatalogStore(path)
    write(first, make_found())
    with monkeypatch.context() as patch:
        patch.setattr("catalog.store.open_catalog", limited)
        store = CatalogStore(path)
    many = [make_found(f"/n/{n}.gguf", name=f"n{n}") for n in range(500)]
    for _ in range(3):
        with pytest.raises(CatalogNotWritten, match="the disk is full"):
            write(store, *many)
        assert [record.info.name for record in store.models()] == ["tiny"]
        store.set_alias("small", store.models()[0].id)
        store.remove_alias("small")
    write(first, *many)
    assert len(store.models()) == 501
    first.close()
    store.close()


def test_a_locked_catalog_can_be_read_and_says_who_is_in_the_way_s5(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catalog.connection.BUSY_MS", 50)
    store = CatalogStore(path)
    write(store, make_found())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CatalogNotWritten, match="another program"):
        store.set_alias("small", "tiny@gguf-q4_0")
    assert len(store.models()) == 1
    other.execute("ROLLBACK")
    store.set_alias("small", "tiny@gguf-q4_0")
    other.close()
    store.close()


def test_a_process_that_hangs_while_it_opens_the_catalog_stops_nobody_for_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catalog.migrations._OPENING_S", 0.1)
    CatalogStore(path).close()
    with path.with_name("catalog.sqlite.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ImpetusError, match="kept it locked"):
            CatalogStore(path)
    CatalogStore(path).close()


def test_damage_while_it_is_open_is_moved_aside_and_filled_again_s5(
    path: Path, filled: CatalogStore, caplog: pytest.LogCaptureFixture
) -> None:
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.write(os.urandom(size))
    with pytest.raises(Unavailable, match="damaged"):
        filled.models()
    assert filled.models() == []
    assert "damaged" in caplog.text
    write(filled, make_found())
    assert len(filled.models()) == 1
    assert path.with_name("catalog.sqlite.corrupt-1").stat().st_size == size


def test_a_truncated_file_is_moved_aside_s5(path: Path, filled: CatalogStore) -> None:
    os.truncate(path, 4096 * 3)
    with pytest.raises(ImpetusError):
        filled.models()
    write(filled, make_found())
    assert len(filled.models()) == 1


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_is_deleted_while_it_is_open_is_made_anew(path: Path, how: str) -> None:
    store, other = CatalogStore(path), CatalogStore(path)
    write(store, make_found())
    before = other.data_version()
    if how == "deleted":
        for each in path.parent.glob("catalog.sqlite*"):
            each.unlink()
    else:
        move_aside(path)
        CatalogStore(path).close()
    assert store.models() == []
    assert other.data_version() != before
    write(store, make_found(name="new"))
    assert [record.info.name for record in other.models()] == ["new"]
    store.close()
    other.close()


def test_a_folder_that_went_leaves_what_is_open(path: Path) -> None:
    folder = path.parent / "inner"
    store = CatalogStore(folder / "catalog.sqlite")
    write(store, make_found())
    folder.rename(path.parent / "away")
    (path.parent / "inner").write_text("a file now")
    assert len(store.models()) == 1
    store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE aliases",
        "ALTER TABLE models DROP COLUMN settings",
        "DELETE FROM changes",
        "DROP TABLE models",
    ],
)
def test_a_catalog_with_missing_parts_is_moved_aside(path: Path, statement: str) -> None:
    CatalogStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute(statement)
    connection.commit()
    connection.close()
    store = CatalogStore(path)
    write(store, make_found())
    assert len(store.models()) == 1
    assert path.with_name("catalog.sqlite.corrupt-1").exists()
    store.close()


def test_copies_of_damaged_catalogs_are_limited(path: Path) -> None:
    for number in range(12):
        path.write_bytes(b"no database %d" % number)
        CatalogStore(path).close()
    aside = sorted(each.name for each in path.parent.glob("*.corrupt-*"))
    assert aside == [f"catalog.sqlite.corrupt-{number}" for number in range(1, 6)]
    assert path.with_name("catalog.sqlite.corrupt-5").read_bytes() == b"no database 11"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("info", "{"),
        ("info", "{}"),
        ("info", "[1]"),
        ("info", '{"files": 1, "capabilities": []}'),
        ("source", "null"),
        ("source", "{}"),
        ("reason", "ok"),
    ],
)
def test_a_damaged_row_costs_that_model_only_until_the_next_scan(
    path: Path, column: str, value: str
) -> None:
    store = CatalogStore(path)
    write(store, make_found(), make_found("/m/b.gguf", name="other"))
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE models SET {column} = ? WHERE name = 'tiny'", (value,))
    connection.close()
    is_damaged = column != "reason"
    assert len(store.models()) == 2 - is_damaged
    assert len(store.resolve("tiny")) == 1 - is_damaged
    assert (store.get("tiny@gguf-q4_0") is None) == is_damaged
    write(store, make_found())
    assert len(store.models()) == 2
    store.close()


@pytest.mark.parametrize("text", ["[", "[]", '{"unknown": 1}', "7"])
def test_damaged_settings_are_as_if_they_were_not_set(path: Path, text: str) -> None:
    store = CatalogStore(path)
    write(store, make_found())
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE models SET settings = ?", (text,))
    connection.close()
    assert store.models()[0].settings.priority is None
    store.change_settings("tiny@gguf-q4_0", {"priority": "batch"})
    assert store.models()[0].settings.priority == "batch"
    store.close()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (sqlite3.SQLITE_FULL, "full"),
        (sqlite3.SQLITE_IOERR | (3 << 8), "disk reported"),
        (sqlite3.SQLITE_READONLY, "read-only"),
        (sqlite3.SQLITE_CANTOPEN, "cannot be opened"),
        (sqlite3.SQLITE_BUSY, "another program"),
    ],
)
def test_troubles_that_pass_are_errors_to_retry(path: Path, code: int, text: str) -> None:
    error = sqlite3.OperationalError("as SQLite says it")
    error.sqlite_errorcode = code
    found = failure(path, error)
    assert isinstance(found, CatalogNotWritten)
    assert found.status == 503
    assert found.retry_after_s
    assert text in found.message


KILLER = """
import os, random, signal, sqlite3, sys, time
from pathlib import Path
from catalog.store import CatalogStore
from tests.unit.catalog.builders import make_found, write

path = Path(sys.argv[1])
random.seed(5)
for number in range(30):
    child = os.fork()
    if not child:
        store = CatalogStore(path)
        for step in range(100_000):
            part = [make_found(f"/m/{step % 50}-{n}.gguf", name=f"n{n}", size_bytes=step)
                    for n in range(20)]
            write(store, *part, missing=(f"/m/{step % 7}-1.gguf",))
            store.set_alias(f"a{step % 9}", store.models()[0].id)
        os._exit(1)
    time.sleep(random.uniform(0.005, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], number
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
store = CatalogStore(path)
print(len(store.models()), len(list(path.parent.glob("*corrupt*"))))
"""


def test_kills_at_any_point_leave_an_intact_database_s5(path: Path) -> None:
    CatalogStore(path).close()
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    models, aside = map(int, done.stdout.split())
    assert models > 0
    assert aside == 0


def test_a_rollback_that_fails_does_not_end_the_connection(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an I/O error the next write begins on a connection of its own."""

    class Failing(sqlite3.Connection):
        fails = True

        def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
            if self.fails and sql in ("COMMIT", "ROLLBACK"):
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR
                raise error
            return super().execute(sql, *values)  # type: ignore[arg-type]

    real = sqlite3.connect
    CatalogStore(path).close()
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, factory=Failing, **k))
        store = CatalogStore(path)
    with pytest.raises(CatalogNotWritten):
        write(store, make_found())
    write(store, make_found())
    assert len(store.models()) == 1
    store.close()


def test_no_descriptor_leaks_when_the_catalog_cannot_be_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    opened = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(Path, "open", refuse)
    for _ in range(3):
        with pytest.raises(ImpetusError, match="read-only"):
            CatalogStore(path)
    assert len(os.listdir("/dev/fd")) == opened
