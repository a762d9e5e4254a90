"""A model's own settings in the catalog: changed, kept, and added to catalogs that had none."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from backends.base import EngineOptions
from catalog.encoding import info_to_json, source_to_json
from catalog.migrations import MIGRATIONS, migrate
from catalog.models import Local, ModelSettings
from catalog.store import CatalogStore
from core.errors import ModelNotFound
from tests.unit.catalog.builders import make_found, make_info, write

TINY = "tiny@gguf-q4_0"
ALL: dict[str, Any] = {
    "context_length": 512,
    "keep_alive_s": 0.5,
    "pin": True,
    "priority": "batch",
    "max_sequences": 3,
    "tool_parser": "mistral",
    "runtime": "pytorch",
    "deterministic": True,
}


def settings_of(store: CatalogStore, model_id: str = TINY) -> ModelSettings:
    record = store.get(model_id)
    assert record is not None
    return record.settings


def test_settings_are_the_defaults_until_changed(store: CatalogStore) -> None:
    write(store, make_found(), make_found("/m/b.gguf", name="other"))
    assert settings_of(store) == ModelSettings()
    assert store.change_settings(TINY, ALL) == ModelSettings(**ALL)
    assert settings_of(store) == ModelSettings(**ALL)
    assert settings_of(store, "other@gguf-q4_0") == ModelSettings()


def test_change_leaves_other_fields_and_none_is_the_default_again(store: CatalogStore) -> None:
    write(store, make_found())
    store.change_settings(TINY, ALL)
    store.change_settings(TINY, {"pin": False, "keep_alive_s": None})
    assert settings_of(store) == ModelSettings(**{**ALL, "pin": False, "keep_alive_s": None})


def test_settings_survive_reopening_a_new_scan_and_a_move(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    store = CatalogStore(path)
    write(store, make_found("/m/a.gguf"))
    store.change_settings(TINY, {"pin": True})
    store.close()
    store = CatalogStore(path)
    write(store, make_found("/m/a.gguf", parameters=11))
    assert settings_of(store).pin is True
    write(store, make_found("/n/a.gguf", parameters=11), missing=("/m/a.gguf",))
    record = store.get(TINY)
    assert record is not None
    assert (str(record.info.files[0]), record.settings.pin) == ("/n/a.gguf", True)
    store.close()


def test_change_of_settings_is_seen_as_a_change_by_other_processes(
    store: CatalogStore, tmp_path: Path
) -> None:
    write(store, make_found())
    other = CatalogStore(tmp_path / "catalog.sqlite")
    before = other.data_version()
    store.change_settings(TINY, {"max_sequences": 2})
    assert other.data_version() != before
    assert settings_of(other).max_sequences == 2
    other.close()


@pytest.mark.parametrize("name", ["none@gguf", "\ud83d", "", "x' OR '1'='1"])
def test_settings_of_an_unknown_model_cannot_be_changed(store: CatalogStore, name: str) -> None:
    write(store, make_found())
    before = store.data_version()
    with pytest.raises(ModelNotFound):
        store.change_settings(name, {"pin": True})
    assert (store.data_version(), settings_of(store)) == (before, ModelSettings())


def test_a_name_that_is_no_setting_changes_nothing(store: CatalogStore) -> None:
    write(store, make_found())
    before = store.data_version()
    with pytest.raises(TypeError):
        store.change_settings(TINY, {"pin": True, "state": "refused"})
    assert (store.data_version(), settings_of(store)) == (before, ModelSettings())


def test_catalog_of_the_first_schema_keeps_all_its_data(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    info = make_info("/m/a.gguf")
    rows = [
        ("/m/a.gguf", TINY, TINY, "tiny", "ok", "", "1:a", 12.5),
        ("/m/b.gguf", f"{TINY}-2", TINY, "tiny", "refused", "cut off", "1:b", 13.5),
        ("/m/c.gguf", f"{TINY}-3", TINY, "tiny", "missing", "gone", "1:c", 14.5),
    ]
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, MIGRATIONS[:1])
    connection.executemany(
        "INSERT INTO models (key, id, base_id, name, state, reason, fingerprint, added_at, source,"
        " info) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(*row, source_to_json(Local("/m")), info_to_json(info)) for row in rows],
    )
    connection.execute("INSERT INTO aliases VALUES ('mine', ?)", (f"{TINY}-2",))
    connection.execute("UPDATE changes SET count = 77")
    connection.close()

    store = CatalogStore(path)

    kept = [(r.id, r.state, r.reason, r.fingerprint, r.added_at) for r in store.models()]
    assert kept == [(row[1], *row[4:]) for row in rows]
    assert all(
        (r.info, r.source, r.settings) == (info, Local("/m"), ModelSettings())
        for r in store.models()
    )
    assert (store.aliases(), store.data_version()) == ({"mine": f"{TINY}-2"}, 77)
    store.change_settings(f"{TINY}-2", {"pin": True})
    store.close()
    reopened = CatalogStore(path)
    assert [record.settings.pin for record in reopened.models()] == [None, True, None]
    assert list(tmp_path.glob("*corrupt*")) == []
    reopened.close()


@pytest.mark.parametrize(
    ("own", "server", "granted"),
    [(None, None, None), (512, None, 512), (None, 256, 256), (512, 256, 256), (128, 256, 128)],
)
def test_context_is_bounded_by_the_model_and_by_the_server(
    own: int | None, server: int | None, granted: int | None
) -> None:
    options = EngineOptions(context_tokens=server, threads=3)
    applied = ModelSettings(context_length=own).applied_to(options)
    assert applied == EngineOptions(context_tokens=granted, threads=3)


@pytest.mark.parametrize(
    ("own", "server", "granted"), [(None, None, 512), (2048, None, 2048), (None, 256, 256)]
)
def test_the_context_that_a_model_came_with_applies_unless_the_user_has_another(
    store: CatalogStore, own: int | None, server: int | None, granted: int
) -> None:
    write(store, make_found(details={"default_context": 512}))
    store.change_settings(TINY, {"context_length": own})
    record = store.get(TINY)
    assert record is not None
    assert record.engine_options(EngineOptions(context_tokens=server)).context_tokens == granted


def test_tool_parser_of_the_model_reaches_the_engine() -> None:
    assert ModelSettings().applied_to(EngineOptions()).tool_parser is None
    applied = ModelSettings(tool_parser="mistral").applied_to(EngineOptions())
    assert applied.tool_parser == "mistral"


def test_a_deterministic_model_runs_one_sequence_at_a_time() -> None:
    options = EngineOptions(max_sequences=16)
    applied = ModelSettings(deterministic=True, max_sequences=9).applied_to(options)
    assert (applied.deterministic, applied.max_sequences) == (True, 1)
    for off in (None, False):
        applied = ModelSettings(deterministic=off, max_sequences=9).applied_to(options)
        assert (applied.deterministic, applied.max_sequences) == (False, 9)


def test_sequences_of_the_model_replace_those_of_the_server() -> None:
    options = EngineOptions(max_sequences=16)
    assert ModelSettings().applied_to(options).max_sequences == 16
    assert ModelSettings(max_sequences=32).applied_to(options).max_sequences == 32
