"""The engines that the contract is checked on."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backends.base import Engine, EngineOptions
from backends.echo import EchoBackend, echo_info
from backends.gguf import GgufBackend
from tests.starter import starter_path, write_full_precision

OPTIONS = EngineOptions(max_sequences=8, threads=1, context_tokens=2048, kv_tokens=8192)


@pytest.fixture(scope="session")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter's weights as float32."""
    return write_full_precision(tmp_path_factory.mktemp("models") / "smollm2-f32.gguf")


async def _open(backend: str, full_precision: Path, options: EngineOptions) -> Engine:
    if backend == "echo":
        return EchoBackend().open(echo_info(), options)
    gguf = GgufBackend()
    path = full_precision if backend == "gguf-f32" else starter_path()
    return gguf.open(gguf.identify(path), options)


@pytest_asyncio.fixture(params=["echo", "gguf", "gguf-f32"], scope="module", loop_scope="module")
async def engine(request: pytest.FixtureRequest, full_precision: Path) -> AsyncIterator[Engine]:
    """Each backend with its real model."""
    engine = await _open(request.param, full_precision, OPTIONS)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gguf(full_precision: Path) -> AsyncIterator[Engine]:
    """The starter in full precision, so that token ids can be compared exactly."""
    engine = await _open("gguf-f32", full_precision, OPTIONS)
    yield engine
    await engine.close()
