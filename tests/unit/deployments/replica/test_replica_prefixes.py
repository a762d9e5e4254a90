"""Where a replica keeps computed prefixes, and what counts as another version of a model."""

from dataclasses import replace
from pathlib import Path

import pytest

from backends.base import EngineOptions
from backends.echo import echo_info
from core.settings import Settings
from core.units import GIB
from deployments.messages import FileMark, LoadRequest
from deployments.options import budget_bytes
from deployments.replica.prefixes import open_block_store, prefix_store_of
from tests.prefixes import prompt_of, state_of

ORDER = LoadRequest("model", echo_info(), EngineOptions())
MARK = FileMark("/models/one.gguf", 100, 7, 3)


def settings(home: Path, *, ram: int = 0, disk: int = 1 << 20) -> Settings:
    return Settings(home=home, prefix_ram=ram, prefix_disk=disk)


def test_nothing_is_kept_where_both_are_switched_off(tmp_path: Path) -> None:
    assert open_block_store(settings(tmp_path, disk=0)) is None
    assert prefix_store_of(None, ORDER, [MARK]) is None
    assert list(tmp_path.iterdir()) == []


def test_files_are_below_the_home(tmp_path: Path) -> None:
    store = open_block_store(settings(tmp_path))
    assert store is not None
    place = prefix_store_of(store, ORDER, [MARK])
    assert place is not None
    place.open("layout").put(prompt_of(1), 0, state_of(0))
    store.close()
    (file,) = (tmp_path / "cache" / "prefixes").glob("*/*.block")
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("mark", "is_same"),
    [
        (MARK, True),
        (replace(MARK, size_bytes=101), False),
        (replace(MARK, modified_ns=8), False),
        (replace(MARK, inode=4), False),
        (replace(MARK, path="/models/other.gguf"), False),
    ],
)
def test_a_changed_file_is_another_version(tmp_path: Path, mark: FileMark, is_same: bool) -> None:
    store = open_block_store(settings(tmp_path))
    first, second = prefix_store_of(store, ORDER, [MARK]), prefix_store_of(store, ORDER, [mark])
    assert store is not None
    assert first is not None
    assert second is not None
    tokens = prompt_of(1)
    first.open("layout").put(tokens, 0, state_of(0))
    found = second.open("layout")
    assert (len(found.chain(tokens)) == 1) == is_same
    # Another file is another model, the same one changed is another version of it.
    if not is_same:
        reason = "other_model_version" if mark.path == MARK.path else "no_snapshot"
        assert found.why_absent(tokens, 0) == reason
    store.close()


def test_a_model_without_files_keeps_nothing(tmp_path: Path) -> None:
    store = open_block_store(settings(tmp_path))
    assert prefix_store_of(store, ORDER, []) is None
    assert store is not None
    store.close()


def test_the_models_budget_leaves_room_for_the_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.options.machine_memory_bytes", lambda: 64 * GIB)
    with_none = budget_bytes(Settings(prefix_ram=0))
    assert budget_bytes(Settings(prefix_ram=GIB)) == with_none - GIB
    assert budget_bytes(Settings(prefix_ram=100 * GIB)) == with_none // 2
    assert budget_bytes(Settings(prefix_ram=GIB, memory_budget=GIB)) == GIB
