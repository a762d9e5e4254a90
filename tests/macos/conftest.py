"""The project's packages as a Mac gets them."""

import shutil
from collections.abc import Iterator

import pytest

from tests.macos.mac_packages import MacPackages


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MacPackages]:
    """uv with the project's pins."""
    folder = tmp_path_factory.mktemp("packages")
    yield MacPackages(folder)
    # A gigabyte of wheels.
    shutil.rmtree(folder)
