"""What the zoo's tests share: the process that builds models, and the one that inspects files."""

from collections.abc import Iterator

import pytest

from backends.registry import load_backends
from catalog.scan.inspector import Inspector
from tests.contract.zoo.models import Builder


@pytest.fixture(scope="session")
def builder() -> Iterator[Builder]:
    """Builds the models that are not in the cache."""
    builder = Builder()
    yield builder
    builder.close()


@pytest.fixture(scope="session")
def inspector() -> Iterator[Inspector]:
    """Identifies files as a scan does."""
    # A machine under load is slow, and slowness is no failure.
    inspector = Inspector(list(load_backends()), file_limit_s=300.0)
    yield inspector
    inspector.close()
