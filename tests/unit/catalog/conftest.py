"""Fixtures of the catalog's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from catalog.store import CatalogStore
from tests.unit.catalog.library import GgufIdentification, Library


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CatalogStore]:
    """An empty catalog."""
    store = CatalogStore(tmp_path / "catalog.sqlite")
    yield store
    store.close()


@pytest.fixture
def library(tmp_path: Path, store: CatalogStore) -> Library:
    """An empty library with its models folder."""
    home = tmp_path.resolve()
    (home / "models").mkdir()
    return Library(home, store, GgufIdentification())
