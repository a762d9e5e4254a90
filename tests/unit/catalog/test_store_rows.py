"""Rows S5 to S8 of the catalog: kills, cut journals, durability, SQL in names, old schemas."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from catalog import migrations
from catalog.encoding import info_to_json, source_to_json
from catalog.migrations import MIGRATIONS, migrate
from catalog.models import Local
from catalog.store import CatalogStore
from core.errors import ImpetusError, ModelNotFound, NotFound, RequestError
from tests.gguf_raw import minimal_gguf
from tests.unit.catalog.builders import make_found, make_info, write
from tests.unit.catalog.library import Library

ROOT = Path(__file__).parents[3]
TINY = "tiny@gguf-q4_0"
HOSTILE = [
    "'; DROP TABLE models; --",
    '"; DELETE FROM aliases; --',
    "' OR '1'='1",
    "tiny' UNION SELECT key, id FROM models --",
    "%",
    "_iny",
    "t%",
    "tiny,other",
    "*",
    "tiny\x00",
    "$.details",
]

KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from catalog.store import CatalogStore
from tests.unit.catalog.builders import make_found, write

path = Path(sys.argv[1])
points = int(sys.argv[2])
CatalogStore(path).close()
committed = 0
for point in range(points):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        store = CatalogStore(path)
        left = 3 + point * 17

        def count():
            global left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return 0

        # Called between the steps of SQLite's virtual machine: while it writes.
        store._connection.set_progress_handler(count, 5)
        for number in range(committed + 1, committed + 1000):
            write(store, *(make_found(f"/m/{number % 40}-{part}.gguf", name=f"n{part}",
                                      size_bytes=number) for part in "abc"))
            os.write(writer, number.to_bytes(8, "big"))
        os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
    committed = max(committed, int.from_bytes(told[-8:], "big"))
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], point
    connection.close()
    store = CatalogStore(path)
    sizes = sorted(record.info.size_bytes for record in store.models())
    store.close()
    # Whole transactions only, and none that was committed is lost.
    assert all(sizes.count(size) == 3 for size in sizes), point
    assert committed == 0 or sizes[-1] in (committed, committed + 1), (point, sizes[-1], committed)
print(committed, len(list(path.parent.glob("*corrupt*"))))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


def test_a_kill_at_200_points_of_writes_loses_no_committed_row_s5(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), "200"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    committed, aside = map(int, done.stdout.split())
    assert committed > 100
    assert aside == 0


def test_a_copy_whose_journal_was_cut_holds_whole_transactions_s5(
    path: Path, tmp_path: Path
) -> None:
    """What a backup program copies while the server writes: a journal that ends anywhere."""
    store = CatalogStore(path)
    for number in range(12):
        write(store, *(make_found(f"/m/{number}{part}.gguf", name=f"n{number}") for part in "ab"))
    journal = path.with_name(path.name + "-wal").read_bytes()
    assert len(journal) > 40_000
    copy = tmp_path / "copy" / path.name
    seen = set()
    for end in range(0, len(journal), len(journal) // 60):
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir()
        shutil.copyfile(path, copy)
        copy.with_name(copy.name + "-wal").write_bytes(journal[:end])
        opened = CatalogStore(copy)
        names = [record.info.name for record in opened.models()]
        opened.close()
        assert sorted(names) == sorted([f"n{number}" for number in range(len(names) // 2)] * 2)
        assert list(copy.parent.glob("*corrupt*")) == []
        seen.add(len(names))
    store.close()
    assert len(seen) > 8


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_what_is_committed_is_on_the_disk_s6(
    path: Path, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    store = CatalogStore(path)
    with store._reading() as connection:
        values = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "fullfsync", "checkpoint_fullfsync")
        }
    store.close()
    is_mac = int(platform == "darwin")
    assert values == {
        "journal_mode": "wal", "synchronous": 2,
        "fullfsync": is_mac, "checkpoint_fullfsync": is_mac,
    }  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_sql_and_wildcards_in_names_are_text_s7(store: CatalogStore, name: str) -> None:
    write(store, make_found("/m/a.gguf"), make_found("/m/b.gguf", name="other"))
    store.set_alias("mine", TINY)
    before = store.data_version()
    assert store.get(name) is None
    assert store.resolve(name) == []
    with pytest.raises(RequestError):
        store.set_alias(name, TINY)
    with pytest.raises(ModelNotFound):
        store.set_alias("another", name)
    with pytest.raises(NotFound):
        store.remove_alias(name)
    with pytest.raises(ModelNotFound):
        store.change_settings(name, {"pin": True})
    assert store.data_version() == before
    assert store.aliases() == {"mine": TINY}
    assert len(store.models()) == 2


def test_sql_in_what_files_say_of_themselves_is_text_s7(store: CatalogStore) -> None:
    quoted = "'); DROP TABLE models; --"
    found = make_found(f"/m/{quoted}.gguf", name="tiny", license=quoted, chat_template=quoted)
    write(store, found)
    (record,) = store.models()
    assert (record.info.license, record.info.chat_template) == (quoted, quoted)
    write(store, missing=(f"/m/{quoted}.gguf",))
    assert [record.state for record in store.models()] == ["missing"]


def fill_schema(path: Path, version: int) -> list[tuple[object, ...]]:
    """Make a catalog of an older schema; return what its models and aliases are."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    migrate(connection, MIGRATIONS[:version])
    for number in range(50):
        info = make_info(f"/m/{number}.gguf", name=f"n{number}")
        connection.execute(
            "INSERT INTO models (key, id, base_id, name, state, reason, fingerprint, added_at, "
            "source, info) VALUES (?, ?, ?, ?, 'ok', '', ?, ?, ?, ?)",
            (
                *(f"/m/{number}.gguf", f"n{number}@gguf-q4_0", f"n{number}@gguf-q4_0"),
                *(f"n{number}", f"1:{number}", float(number)),
                *(source_to_json(Local("/m")), info_to_json(info)),
            ),
        )
    connection.execute("INSERT INTO aliases VALUES ('mine', 'n7@gguf-q4_0')")
    rows = rows_of(connection)
    connection.close()
    return rows


def rows_of(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    models = connection.execute(
        "SELECT key, id, base_id, name, state, reason, fingerprint, added_at, source, info "
        "FROM models ORDER BY id"
    )
    return [*models, *connection.execute("SELECT * FROM aliases ORDER BY alias")]


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_every_older_schema_keeps_all_rows_and_a_backup_s8(path: Path, version: int) -> None:
    rows = fill_schema(path, version)
    store = CatalogStore(path)
    with store._reading() as connection:
        assert rows_of(connection) == rows
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert len(store.models()) == 50
    assert store.resolve("mine")[0].info.name == "n7"
    store.close()
    backup = sqlite3.connect(path.with_name(f"{path.name}.schema-{version}"))
    assert backup.execute("PRAGMA user_version").fetchone() == (version,)
    assert rows_of(backup) == rows
    backup.close()
    assert list(path.parent.glob("*.part")) == []
    # The next start has nothing to migrate, and copies nothing.
    CatalogStore(path).close()
    assert len(list(path.parent.glob("*.schema-*"))) == 1


def test_a_migration_that_fails_leaves_the_old_schema_with_all_rows_s8(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = fill_schema(path, 1)

    def fails(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM models")
        connection.execute("INSERT INTO nowhere VALUES (1)")

    with monkeypatch.context() as patch:
        patch.setattr(migrate, "__defaults__", ((MIGRATIONS[0], fails),))
        patch.setattr(migrations, "MIGRATIONS", (MIGRATIONS[0], fails))
        with pytest.raises(ImpetusError, match="rolled back"):
            CatalogStore(path)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert rows_of(connection) == rows
    connection.close()
    store = CatalogStore(path)
    assert len(store.models()) == 50
    store.close()


def test_a_new_catalog_has_no_backup_s8(path: Path) -> None:
    CatalogStore(path).close()
    assert list(path.parent.glob("*.schema-*")) == []


def test_a_damaged_catalog_is_filled_again_by_the_next_scan_s5(
    library: Library, path: Path
) -> None:
    for name in ("a", "b"):
        minimal_gguf(library.models / f"{name}.gguf")
    library.scan()
    ids = library.ids()
    library.store.close()
    path.write_bytes(b"damaged" * 5000)
    library.store = CatalogStore(path)
    assert library.ids() == []
    library.scan()
    assert library.ids() == ids
    library.store.close()
    assert [file.read_bytes()[:7] for file in path.parent.glob("*.corrupt-1")] == [b"damaged"]
