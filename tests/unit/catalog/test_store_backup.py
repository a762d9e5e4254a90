"""Backups of the catalog: before a migration, and in place of a damaged file."""

import os
import sqlite3
from pathlib import Path

import pytest

from catalog.migrations import MIGRATIONS, back_up, backup_path, migrate, open_catalog
from catalog.store import CatalogStore
from core.errors import ImpetusError
from tests.unit.catalog.builders import make_found, write

TINY = "tiny@gguf-q4_0"
NEWEST = len(MIGRATIONS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


def fill(path: Path) -> None:
    """Make a catalog with two models, an alias and settings, and its backup."""
    store = CatalogStore(path)
    write(store, make_found(), make_found("/m/b.gguf", name="other"))
    store.set_alias("coder", TINY)
    store.change_settings(TINY, {"pin": True, "notes": "mine"})
    store.back_up()
    store.close()


def damage(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(os.urandom(path.stat().st_size))


def made_by(path: Path, version: int) -> None:
    """Write a catalog with an older schema that has one model and an alias."""
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, MIGRATIONS[:version])
    known = CatalogStore(path.with_name("whole.sqlite"))
    write(known, make_found())
    known.close()
    columns = "key, id, base_id, name, state, reason, fingerprint, added_at, source, info"
    connection.execute("ATTACH ? AS whole", (str(path.with_name("whole.sqlite")),))
    connection.execute(f"INSERT INTO models ({columns}) SELECT {columns} FROM whole.models")
    connection.execute("INSERT INTO aliases VALUES ('coder', ?)", (TINY,))
    connection.close()


def test_s5_a_damaged_catalog_comes_back_with_aliases_and_settings(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(path)
    before = CatalogStore(path)
    version = before.data_version()
    before.close()
    damage(path)
    store = CatalogStore(path)
    assert "Its last backup is used" in caplog.text
    assert store.data_version() != version
    assert store.aliases() == {"coder": TINY}
    record = store.get(TINY)
    assert record is not None
    assert (record.settings.pin, record.settings.notes) == (True, "mine")
    assert len(store.models()) == 2
    store.change_settings(TINY, {"pin": None})
    store.close()
    assert path.with_name("catalog.sqlite.corrupt-1").exists()


@pytest.mark.parametrize("how", ["damaged", "newer", "missing"])
def test_a_backup_that_cannot_be_used_leaves_an_empty_catalog(path: Path, how: str) -> None:
    fill(path)
    backup = backup_path(path)
    if how == "damaged":
        damage(backup)
    elif how == "missing":
        backup.unlink()
    else:
        connection = sqlite3.connect(backup)
        connection.execute("PRAGMA user_version = 99")
        connection.commit()
        connection.close()
    damage(path)
    store = CatalogStore(path)
    assert store.models() == []
    write(store, make_found())
    assert len(store.models()) == 1
    store.close()


def test_backup_is_made_only_after_changes(path: Path) -> None:
    fill(path)
    store = CatalogStore(path)
    store.back_up()
    first = backup_path(path).stat().st_ino
    store.back_up()
    assert backup_path(path).stat().st_ino == first
    store.set_alias("another", TINY)
    store.back_up()
    connection = sqlite3.connect(backup_path(path))
    aliases = connection.execute("SELECT count(*) FROM aliases").fetchone()
    connection.close()
    assert aliases == (2,)
    store.close()
    assert not list(path.parent.glob("*.part"))


def test_a_damaged_catalog_does_not_replace_a_sound_backup(path: Path) -> None:
    fill(path)
    sound = backup_path(path).read_bytes()
    with path.open("rb+") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    with pytest.raises(sqlite3.Error):
        back_up(path, backup_path(path))
    assert backup_path(path).read_bytes() == sound
    assert not list(path.parent.glob("*.part"))


def test_no_migration_without_a_copy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by(path, 1)

    def full(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("catalog.migrations.back_up", full)
        with pytest.raises(ImpetusError, match="only after it was copied"):
            CatalogStore(path)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    connection.close()
    open_catalog(path).close()
