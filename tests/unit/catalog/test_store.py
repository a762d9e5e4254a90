"""Tests of the catalog's database: its rules, its names, and what it survives."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from catalog.migrations import MIGRATIONS, migrate
from catalog.models import BuiltIn, Converted, Local, Package, ScannedModel, Source
from catalog.store import CatalogStore
from core.errors import ImpetusError, ModelNotFound, NotFound, RequestError
from tests.unit.catalog.builders import make_found, make_info, write

ROOT = Path(__file__).parents[3]
WRITER = """
import sys
from pathlib import Path
from catalog.store import CatalogStore
from tests.unit.catalog.builders import make_found, write

store = CatalogStore(Path(sys.argv[1]))
start = int(sys.argv[2])
for number in range(start, start + 10_000):
    pair = [make_found(f"/m/{number}-{part}.gguf", name=f"n{number}-{part}") for part in "ab"]
    write(store, *pair)
    print(number, flush=True)
"""


def test_record_comes_back_as_it_was_written(store: CatalogStore) -> None:
    write(store, make_found("/m/Tiny.gguf"))
    record = store.models()[0]
    assert record.id == "tiny@gguf-q4_0"
    assert record.info == make_info("/m/Tiny.gguf")
    assert (record.source, record.added_at, record.state) == (Local("/m"), 100.0, "ok")
    assert store.get(record.id) == record


@pytest.mark.parametrize(
    "source",
    [
        Local("/a"),
        Package("x", "1.2"),
        Converted("/a", "m@gguf-f16"),
        Converted("/a", "m@gguf-f16", {"quantization": "4bit"}, {"tokens": 8, "kl_mean": 0.5}),
        BuiltIn(),
    ],
)
def test_source_comes_back_as_it_was_written(store: CatalogStore, source: Source) -> None:
    write(store, ScannedModel(make_info(), source, "1:"))
    assert store.models()[0].source == source


def test_refused_entry_keeps_its_reason_and_becomes_ok(store: CatalogStore) -> None:
    first = write(store, make_found(reason="it is cut off", quantization=""))
    assert first.refused == ("tiny@gguf",)
    assert store.models()[0].reason == "it is cut off"

    second = write(store, make_found())
    assert second.changed == ("tiny@gguf-q4_0",)
    assert [(record.id, record.state) for record in store.models()] == [("tiny@gguf-q4_0", "ok")]


def test_twins_get_numbered_ids_that_never_swap(store: CatalogStore) -> None:
    write(store, make_found("/m/b.gguf"), make_found("/m/a.gguf"))
    write(store, make_found("/m/a.gguf", size_bytes=7), make_found("/m/b.gguf", size_bytes=8))
    files = {record.id: str(record.info.files[0]) for record in store.models()}
    assert files == {"tiny@gguf-q4_0": "/m/b.gguf", "tiny@gguf-q4_0-2": "/m/a.gguf"}


def test_missing_entry_stays_and_keeps_its_id_when_it_moved(store: CatalogStore) -> None:
    write(store, make_found("/m/a.gguf"))
    store.set_alias("mine", "tiny@gguf-q4_0")

    report = write(store, make_found("/n/a.gguf"), missing=("/m/a.gguf",))

    assert report.changed == ("tiny@gguf-q4_0",)
    record = store.resolve("mine")[0]
    assert (record.id, str(record.info.files[0])) == ("tiny@gguf-q4_0", "/n/a.gguf")
    assert record.state == "ok"


def test_another_file_does_not_take_a_missing_entrys_id(store: CatalogStore) -> None:
    write(store, make_found("/m/a.gguf"))
    write(store, make_found("/n/a.gguf", size_bytes=5), missing=("/m/a.gguf",))
    states = {record.id: record.state for record in store.models()}
    assert states == {"tiny@gguf-q4_0": "missing", "tiny@gguf-q4_0-2": "ok"}


def test_resolve_prefers_id_then_alias_then_bare_name(store: CatalogStore) -> None:
    write(
        store,
        make_found("/m/a.gguf"),
        make_found("/m/b.gguf", quantization="q8_0"),
        make_found("/m/c.gguf", name="other"),
    )
    assert [r.id for r in store.resolve("TINY@gguf-Q8_0")] == ["tiny@gguf-q8_0"]
    assert [r.id for r in store.resolve("Tiny")] == ["tiny@gguf-q4_0", "tiny@gguf-q8_0"]
    store.set_alias("Tiny", "other@gguf-q4_0")
    assert [r.id for r in store.resolve("tINY")] == ["other@gguf-q4_0"]
    assert store.get("other@gguf-q4_0").aliases == ("Tiny",)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name",
    ["", "tin", "/m/tiny.gguf", "x' OR '1'='1", "tiny'; DROP TABLE models; --", "\ud83d", "tiny\0",
     "%", "_iny", "x" * 10_000_000],
)  # fmt: skip
def test_resolve_of_anything_else_finds_nothing(store: CatalogStore, name: str) -> None:
    write(store, make_found())
    assert store.resolve(name) == []
    assert [record.id for record in store.models()] == ["tiny@gguf-q4_0"]


@pytest.mark.parametrize(
    "alias", ["", " x", "a b", "a@b", "-a", "é", "x" * 101, "a';--", "a\n", "tiny@gguf-q4_0"]
)
def test_malformed_alias_is_refused(store: CatalogStore, alias: str) -> None:
    write(store, make_found())
    with pytest.raises(RequestError):
        store.set_alias(alias, "tiny@gguf-q4_0")
    assert store.aliases() == {}


def test_alias_is_moved_and_removed(store: CatalogStore) -> None:
    write(store, make_found(), make_found("/m/b.gguf", name="other"))
    store.set_alias("gpt-4o", "tiny@gguf-q4_0")
    store.set_alias("GPT-4o", "other@gguf-q4_0")
    assert store.aliases() == {"GPT-4o": "other@gguf-q4_0"}
    store.remove_alias("gpt-4O")
    assert store.aliases() == {}
    with pytest.raises(NotFound):
        store.remove_alias("gpt-4o")


@pytest.mark.parametrize("name", ["none@gguf", "\ud83d", ""])
def test_unknown_models_and_aliases_are_refused(store: CatalogStore, name: str) -> None:
    assert store.get(name) is None
    with pytest.raises(ModelNotFound):
        store.set_alias("mine", name)
    with pytest.raises(NotFound):
        store.remove_alias(name)


def test_data_version_differs_after_changes_only(store: CatalogStore, tmp_path: Path) -> None:
    other = CatalogStore(tmp_path / "catalog.sqlite")
    before = other.data_version()
    write(store)
    assert other.data_version() == before
    write(store, make_found())
    changed = other.data_version()
    assert changed != before
    with pytest.raises(ModelNotFound):
        store.set_alias("mine", "none@gguf")
    assert other.data_version() == changed
    other.close()


def test_failing_scan_result_writes_nothing(store: CatalogStore) -> None:
    with pytest.raises(UnicodeEncodeError):
        write(store, make_found(), make_found("/m/\ud800.gguf"))
    assert store.models() == []
    write(store, make_found())
    assert len(store.models()) == 1


@pytest.mark.parametrize(
    "content", [b"this is no database" * 500, b"SQLite format 3\0" + b"x" * 999]
)
def test_damaged_catalog_is_moved_aside_s5(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(content)
    (tmp_path / "catalog.sqlite.corrupt-1").write_bytes(b"older")

    store = CatalogStore(path)

    assert store.models() == []
    assert (tmp_path / "catalog.sqlite.corrupt-2").read_bytes() == content
    assert (tmp_path / "catalog.sqlite.corrupt-1").read_bytes() == b"older"
    assert "damaged" in caplog.text
    store.close()


def test_damaged_page_is_noticed_s5(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    store = CatalogStore(path)
    write(store, *(make_found(f"/m/{number}.gguf", name=f"n{number}") for number in range(200)))
    store.close()
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 12] = b"\xa5" * 4096 * 10
    path.write_bytes(data)

    rebuilt = CatalogStore(path)

    assert rebuilt.models() == []
    assert (tmp_path / "catalog.sqlite.corrupt-1").read_bytes() == bytes(data)
    rebuilt.close()


def test_newer_schema_is_refused_and_stays_s5(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE future (x)")
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ImpetusError, match="schema is 99"):
        CatalogStore(path)
    assert [file.name for file in tmp_path.glob("*corrupt*")] == []
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM future").fetchone() == (0,)
    connection.close()


def test_failing_migration_is_undone_s8(tmp_path: Path) -> None:
    def m004_fails(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (x)")
        connection.execute("INSERT INTO nowhere VALUES (1)")

    connection = sqlite3.connect(tmp_path / "x.sqlite", isolation_level=None)
    with pytest.raises(ImpetusError, match="schema 4 failed and was rolled back"):
        migrate(connection, [*MIGRATIONS, m004_fails])
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "models" in tables
    assert "half" not in tables
    assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    connection.close()


def test_impossible_folder_gives_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ImpetusError, match="cannot be opened"):
        CatalogStore(tmp_path / "file" / "catalog.sqlite")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_gives_a_clear_error_s5(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ImpetusError, match="cannot be opened"):
        CatalogStore(tmp_path / "catalog.sqlite")


def test_kill_during_writes_loses_nothing_committed_s5(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    CatalogStore(path).close()
    for round_number in range(8):
        start = round_number * 10_000
        command = [sys.executable, "-c", WRITER, str(path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            for _ in range(round_number % 5 + 1):
                committed = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        store = CatalogStore(path)
        names = {record.info.name for record in store.models()}
        store.close()
        assert {f"n{number}-a" for number in range(start, committed + 1)} <= names
        assert {name[:-1] + "b" for name in names} == {name for name in names if name[-1] == "b"}
    assert list(tmp_path.glob("*corrupt*")) == []


def _read_until(path: Path, count: int) -> None:
    store = CatalogStore(path)
    seen = 0
    while seen < count:
        records = store.models()
        if len(records) % 2 or len(records) < seen:
            os._exit(3)
        seen = len(records)
    os._exit(0)


def test_two_processes_read_while_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    store = CatalogStore(path)
    context = multiprocessing.get_context("spawn")
    readers = [context.Process(target=_read_until, args=(path, 60)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(30):
        write(store, *(make_found(f"/m/{number}{part}", name=f"n{number}{part}") for part in "ab"))
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]
    store.close()


def test_threads_share_one_store(store: CatalogStore) -> None:
    def add(number: int) -> None:
        for part in range(10):
            write(store, make_found(f"/m/{number}-{part}", name=f"n{number}-{part}"))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.models()) == 40


def test_several_processes_may_create_the_catalog_together(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from catalog.store import CatalogStore;"
    code += "CatalogStore(Path(sys.argv[1])).close()"
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "catalog.sqlite")]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]


def test_closing_twice_is_fine(store: CatalogStore) -> None:
    store.close()
    store.close()
    with pytest.raises(ImpetusError):
        store.models()
