"""What the Core ML engine does beyond the contract: the golden tokens, rows, prefixes, memory."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from backends.base import Engine, EngineOptions, ModelInfo
from backends.coreml.backend import CoremlBackend
from core.errors import InsufficientMemory
from core.types import Capability, GenerationRequest, TokenPrompt
from tests.golden import golden, reference
from tests.requests import GreedyTokens, chat, end_of, request, run, text_of, token_ids_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS = EngineOptions(max_sequences=3, threads=1)
STORY = "Once upon a time there was a small harbour town by the grey sea, and in it "


@pytest.fixture(scope="module")
def package() -> Path:
    """The starter as a Core ML package, built before any event loop runs."""
    reference()
    (path,) = golden("coreml").glob("*.mlpackage")
    return path


@pytest.fixture(scope="module")
def info(package: Path) -> ModelInfo:
    """What the package says of itself."""
    return CoremlBackend().identify(package / "Manifest.json")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(info: ModelInfo) -> AsyncIterator[Engine]:
    """The starter in full precision."""
    engine = CoremlBackend().open(info, OPTIONS)
    yield engine
    await engine.close()


def expected() -> list[tuple[GenerationRequest, GreedyTokens]]:
    """Return requests and the greedy tokens that PyTorch computed with the same weights."""
    known = reference()
    return [
        (request(TokenPrompt(ids), max_tokens=len(tokens)), tokens)
        for ids, tokens in zip(known.ids, known.tokens, strict=True)
    ]


async def test_identify_reads_the_package_and_its_tokenizer(package: Path, info: ModelInfo) -> None:
    assert info.architecture == "llama"
    assert info.quantization == "f32"
    assert info.context_length == 512
    assert info.capabilities >= {Capability.CHAT, Capability.COMPLETION}
    assert info.details["runtime"] in ("reference", "coreml")
    assert 134_000_000 < info.parameters < 136_000_000
    assert info.files[0] == package / "Manifest.json"
    assert {path.name for path in info.files} >= {
        "model.mlmodel", "weight.bin", "config.json", "tokenizer.json",
    }  # fmt: skip


async def test_every_file_of_the_package_identifies_the_same_model(
    package: Path, info: ModelInfo
) -> None:
    for path in package.rglob("*"):
        if path.is_file():
            assert CoremlBackend().identify(path) == info


async def test_greedy_tokens_are_those_of_pytorch(engine: Engine) -> None:
    for wanted, tokens in expected():
        found = token_ids_of(await run(engine, wanted))
        assert found == tokens.first(len(found))
        assert len(found) > 5


async def test_rows_together_give_the_tokens_they_give_alone(engine: Engine) -> None:
    pairs = expected()
    answers = await asyncio.gather(*(run(engine, wanted) for wanted, _ in pairs))
    for answer, (_, tokens) in zip(answers, pairs, strict=True):
        found = token_ids_of(answer)
        assert found == tokens.first(len(found))


async def test_a_second_turn_reuses_the_first(engine: Engine) -> None:
    first = await run(engine, request(STORY * 4, max_tokens=4))
    again = await run(engine, request(STORY * 4 + "lived", max_tokens=4))
    assert end_of(again).usage.cached_tokens > end_of(first).usage.prompt_tokens // 2


async def test_a_reused_prefix_does_not_change_the_answer(engine: Engine, info: ModelInfo) -> None:
    await run(engine, request(STORY * 3 + "a fisherman", max_tokens=6))
    warm = await run(engine, request(STORY * 3 + "an old cat", max_tokens=6))
    assert end_of(warm).usage.cached_tokens > 0
    fresh = CoremlBackend().open(info, replace(OPTIONS, max_sequences=1))
    try:
        cold = await run(fresh, request(STORY * 3 + "an old cat", max_tokens=6))
    finally:
        await fresh.close()
    assert end_of(cold).usage.cached_tokens == 0
    assert text_of(cold) == text_of(warm)


async def test_a_chat_is_answered(engine: Engine) -> None:
    answer = await run(engine, request(chat("What is gravity?"), max_tokens=12))
    assert "ravity" in text_of(answer)


async def test_a_closed_engine_gives_its_requests_an_end(info: ModelInfo) -> None:
    engine = CoremlBackend().open(info, replace(OPTIONS, max_sequences=1))
    await engine.close()
    await engine.close()
    assert engine.load().running == 0


async def test_estimate_grants_fewer_rows_where_memory_is_short(info: ModelInfo) -> None:
    backend = CoremlBackend()
    full = backend.estimate(info, OPTIONS)
    state = full.kv_bytes // 3
    limit = full.total_bytes - state
    tight = backend.estimate(info, replace(OPTIONS, memory_limit_bytes=limit))
    assert tight.kv_bytes == 2 * state
    assert tight.total_bytes <= limit
    assert tight.context_tokens == full.context_tokens
    with pytest.raises(InsufficientMemory, match="512 tokens"):
        backend.estimate(info, replace(OPTIONS, memory_limit_bytes=limit - 2 * state))
