"""Fixtures of the scan's tests."""

from pathlib import Path

import pytest

from catalog.store import CatalogStore
from tests.unit.catalog.scan.folders import Shelf


@pytest.fixture
def shelf(tmp_path: Path, store: CatalogStore) -> Shelf:
    """An empty model folder that is scanned with every format."""
    home = tmp_path.resolve()
    (home / "models").mkdir()
    return Shelf(home, store)
