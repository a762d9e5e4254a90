"""Folders that users add at run time are scanned, also by the next process."""

from pathlib import Path

import pytest

from catalog.added_folders import MAX_ADDED, add_folder, added_folders, remove_folder
from catalog.scan.places import own_folders
from catalog.store import CatalogStore
from core.errors import RequestError
from core.settings import Settings
from tests.unit.catalog.scan.folders import Shelf, write_model


def test_added_folder_is_scanned_until_it_is_removed(tmp_path: Path) -> None:
    home, theirs = tmp_path / "home", tmp_path / "theirs"
    settings = Settings(home=home)
    home.mkdir()
    write_model(theirs / "nice")
    assert own_folders(settings) == [home / "models"]
    add_folder(settings, theirs)
    add_folder(settings, theirs)
    assert own_folders(Settings(home=home)) == [home / "models", theirs]
    shelf = Shelf(home, CatalogStore(settings.catalog_file))
    shelf.scan()
    assert shelf.states() == {"nice@safetensors-f32": "ok"}
    assert remove_folder(settings, theirs)
    assert not remove_folder(settings, theirs)
    shelf.scan()
    assert shelf.states() == {"nice@safetensors-f32": "missing"}
    assert (theirs / "nice" / "config.json").exists()
    shelf.store.close()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"folders": 3}', '{"folders": [3]}', '{"folders": ["rel"]}', "[" * 9999]
)
def test_damaged_list_costs_no_other_folder(tmp_path: Path, content: str) -> None:
    settings = Settings(home=tmp_path, models_path=[tmp_path / "named"])
    (tmp_path / "model_folders.json").write_text(content)
    assert own_folders(settings) == [tmp_path / "models", tmp_path / "named"]


def test_number_of_added_folders_is_bounded(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for number in range(MAX_ADDED):
        add_folder(settings, tmp_path / f"m{number}")
    with pytest.raises(RequestError, match="200 folders were added"):
        add_folder(settings, tmp_path / "more")
    assert len(added_folders(settings)) == MAX_ADDED
