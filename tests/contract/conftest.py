"""The engines that the contract is checked on."""

import importlib.util
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from backends.base import Engine, EngineOptions
from backends.mlx.model import import_runtime
from tests.contract.report import ContractReport
from tests.contract.zoo.report import ZooReport
from tests.golden import golden
from tests.models import GOLDEN, VARIANTS, open_variant

# A test's module that imports MLX itself would leave all tests the slow BLAS of its package.
if importlib.util.find_spec("mlx_lm") is not None:
    import_runtime(1)
OPTIONS = EngineOptions(max_sequences=8, threads=1, context_tokens=512, kv_tokens=4096)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the reports' file names."""
    parser.addoption("--contract-report", type=Path, help="write which backend passed which case")
    parser.addoption("--zoo-report", type=Path, help="write which runtime each architecture uses")


def pytest_configure(config: pytest.Config) -> None:
    """Collect outcomes where a report is wanted."""
    # With several processes the one that collects their reports writes.
    if hasattr(config, "workerinput"):
        return
    if (path := config.getoption("--contract-report", None)) is not None:
        config.pluginmanager.register(ContractReport(path, VARIANTS), "contract-report")
    if (path := config.getoption("--zoo-report", None)) is not None:
        config.pluginmanager.register(ZooReport(path), "zoo-report")


@pytest.fixture(scope="session")
def full_precision() -> Path:
    """The starter's weights as float32."""
    return golden("gguf-f32")


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Each format with its real model, which is built before any event loop runs."""
    name = str(request.param)
    if name in GOLDEN:
        golden(GOLDEN[name])
    return name


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(variant: str) -> AsyncIterator[Engine]:
    """Each backend with its real model."""
    # A token of the echo model is a byte, so the same text needs more of them.
    options = replace(OPTIONS, context_tokens=2048) if variant == "echo" else OPTIONS
    engine = open_variant(variant, options)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def gguf(full_precision: Path) -> AsyncIterator[Engine]:
    """The starter in full precision, so that token ids can be compared exactly."""
    del full_precision
    engine = open_variant("gguf-f32", replace(OPTIONS, context_tokens=2048, kv_tokens=8192))
    yield engine
    await engine.close()
