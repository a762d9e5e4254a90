"""What the MLX engine does beyond the contract: the golden tokens, batches, prefixes, memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from backends.base import Engine, EngineOptions, ModelInfo
from backends.mlx.backend import MlxBackend
from core.errors import EngineFailed, RequestError
from core.types import Capability, GenerationRequest, JsonOutput, JsonValue, TokenPrompt
from tests.golden import golden, reference
from tests.requests import (
    GreedyTokens,
    assert_repeated,
    chat,
    end_of,
    request,
    rounding,
    run,
    text_of,
    token_ids_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS = EngineOptions(max_sequences=4, threads=1, context_tokens=1024, kv_tokens=4096)
STORY = "Once upon a time there was a small harbour town by the grey sea, and in it "


def model_of(kind: str) -> ModelInfo:
    (path,) = (path for path in golden(kind).iterdir() if path.suffix in (".safetensors", ".npz"))
    return MlxBackend().identify(path)


def open_model(kind: str, options: EngineOptions = OPTIONS) -> Engine:
    return MlxBackend().open(model_of(kind), options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mlx(built: None) -> AsyncIterator[Engine]:
    """The starter in full precision."""
    del built
    engine = open_model("mlx-f32")
    yield engine
    await engine.close()


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Build the models before any event loop runs."""
    for kind in ("hf-f32", "mlx-f32", "mlx-4bit", "npz"):
        golden(kind)


def expected() -> list[tuple[GenerationRequest, GreedyTokens]]:
    """Return requests and the greedy tokens that PyTorch computed with the same weights."""
    known = reference()
    return [
        (request(TokenPrompt(tuple(ids)), max_tokens=len(tokens)), tokens)
        for ids, tokens in zip(known.ids, known.tokens, strict=True)
    ]


async def test_greedy_tokens_are_those_of_pytorch(mlx: Engine) -> None:
    for wanted, tokens in expected():
        assert token_ids_of(await run(mlx, wanted)) == tokens


async def test_a_batch_gives_the_same_tokens(mlx: Engine) -> None:
    pairs = expected()
    answers = await asyncio.gather(*(run(mlx, wanted) for wanted, _ in pairs))
    assert [token_ids_of(events) for events in answers] == [tokens for _, tokens in pairs]


async def test_requests_that_come_later_join_and_change_nothing(mlx: Engine) -> None:
    pairs = expected()
    work = []
    for wanted, _ in pairs:
        steps = mlx.load().steps
        work.append(asyncio.ensure_future(run(mlx, wanted)))
        while mlx.load().steps < steps + 5:
            await asyncio.sleep(0.001)
    answers = await asyncio.gather(*work)
    assert [token_ids_of(events) for events in answers] == [tokens for _, tokens in pairs]


async def test_tokens_chosen_on_the_cpu_are_the_same(mlx: Engine) -> None:
    pairs = expected()
    wanted = [
        request(one.prompt, max_tokens=32, top_logprobs=1 if index % 2 else None)
        for index, (one, _) in enumerate(pairs)
    ]
    answers = await asyncio.gather(*(run(mlx, one) for one in wanted))
    assert [token_ids_of(events) for events in answers] == [tokens for _, tokens in pairs]


async def test_a_seed_gives_the_same_text_alone_and_in_a_batch(mlx: Engine) -> None:
    wanted = [request(STORY, temperature=1.2, seed=seed, max_tokens=12) for seed in (1, 2, 3)]
    alone = [text_of(await run(mlx, one)) for one in wanted]
    together = await asyncio.gather(*(run(mlx, one) for one in wanted))
    assert [text_of(events) for events in together] == alone
    assert len(set(alone)) == 3


async def test_logit_bias_bans_and_forces(mlx: Engine) -> None:
    (first,) = token_ids_of(await run(mlx, request(STORY, max_tokens=1)))
    banned = await run(mlx, request(STORY, max_tokens=8, logit_bias={first: -100.0}))
    assert first not in token_ids_of(banned)
    forced = await run(mlx, request(STORY, max_tokens=3, logit_bias={1000: 100.0}))
    assert token_ids_of(forced) == [1000] * 3
    with pytest.raises(RequestError, match="49152"):
        await run(mlx, request(STORY, logit_bias={49152: 1.0}))


async def test_json_output_is_valid_for_its_schema(mlx: Engine) -> None:
    schema: dict[str, JsonValue] = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["age"],
        "additionalProperties": False,
    }
    wanted = request(chat("How old is the cat?"), max_tokens=40, output=JsonOutput(schema))
    events = await run(mlx, wanted)
    assert 0 <= json.loads(text_of(events))["age"] <= 120
    assert end_of(events).reason == "stop"


async def test_the_second_turn_computes_only_what_is_new(mlx: Engine) -> None:
    first = await run(mlx, request("One. " + STORY * 8, max_tokens=8))
    turn = "One. " + STORY * 8 + text_of(first) + " And then"
    usage = end_of(await run(mlx, request(turn, max_tokens=4))).usage
    assert usage.prompt_tokens - usage.cached_tokens <= 16


async def test_the_same_prompt_again_computes_one_token(mlx: Engine) -> None:
    wanted = request("Two. " + STORY * 4, max_tokens=8, top_logprobs=2)
    first = await run(mlx, wanted)
    second = await run(mlx, wanted)
    usage = end_of(second).usage
    assert usage.cached_tokens == usage.prompt_tokens - 1
    assert_repeated(first, second)


async def test_requests_of_one_prompt_at_once_share_its_prefill(mlx: Engine) -> None:
    wanted = [request("Three. " + STORY * 6, max_tokens=4) for _ in range(4)]
    answers = await asyncio.gather(*(run(mlx, one) for one in wanted))
    total = end_of(answers[0]).usage.prompt_tokens
    computed = sorted(total - end_of(events).usage.cached_tokens for events in answers)
    assert computed[:3] == [1, 1, 1]
    assert computed[3] > total // 2
    assert len({text_of(events) for events in answers}) == 1


async def test_a_short_request_passes_a_long_prefill(mlx: Engine) -> None:
    long = asyncio.ensure_future(run(mlx, request("7 " + "long words " * 400, max_tokens=1)))
    while not mlx.load().running:
        await asyncio.sleep(0)
    short = await run(mlx, request("Hi", max_tokens=1))
    assert not long.done()
    assert end_of(short).usage.completion_tokens == 1
    await long


async def test_cancelling_leaves_the_others_alone(mlx: Engine) -> None:
    (wanted, tokens), *_ = expected()
    stream = mlx.generate(request("9 " + STORY, max_tokens=200))
    await anext(stream)
    kept = asyncio.ensure_future(run(mlx, wanted))
    await asyncio.sleep(0.05)
    await stream.aclose()
    assert token_ids_of(await kept) == tokens
    assert mlx.load().running == 0


async def test_a_plain_folder_of_safetensors_opens_too() -> None:
    folder = golden("hf-f32")
    info = model_of("mlx-f32")
    files = tuple(folder / path.name for path in info.files if (folder / path.name).is_file())
    engine = MlxBackend().open(replace(info, format="safetensors", files=files), OPTIONS)
    (wanted, tokens), *_ = expected()
    assert token_ids_of(await run(engine, wanted)) == tokens
    await engine.close()


async def test_an_npz_model_gives_the_same_tokens() -> None:
    engine = open_model("npz")
    (wanted, tokens), *_ = expected()
    assert token_ids_of(await run(engine, wanted)) == tokens
    await engine.close()


async def test_a_decoder_made_for_embeddings_embeds(tmp_path: Path) -> None:
    for path in golden("mlx-f32").iterdir():
        (tmp_path / path.name).symlink_to(path)
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    info = MlxBackend().identify(tmp_path / "model.safetensors")
    assert info.capabilities == {Capability.EMBEDDING}
    engine = MlxBackend().open(info, OPTIONS)
    texts = ["The cat sleeps.", "A kitten is asleep on the warm kitchen floor.", "Tax law"]
    together = (await engine.embed(texts)).vectors
    alone = [(await engine.embed([text])).vectors[0] for text in texts]
    assert together.shape == (3, 576)
    np.testing.assert_allclose(together, alone, atol=rounding(1e-5, metal=1e-3))
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    assert together[0] @ together[1] < 0.9999
    await engine.close()


async def test_closing_frees_the_memory_and_fails_what_runs() -> None:
    import mlx.core as mx

    before = mx.get_active_memory()
    engine = open_model("mlx-f32")
    work = asyncio.ensure_future(run(engine, request(STORY, max_tokens=500)))
    while not engine.load().kv_used_tokens:
        await asyncio.sleep(0.001)
    assert mx.get_active_memory() > before + 400_000_000
    await engine.close()
    with pytest.raises(EngineFailed, match="unload"):
        await work
    assert mx.get_active_memory() < before + 50_000_000


@pytest.mark.parametrize("limit_bytes", [None, 1_200_000_000])
async def test_packed_weights_answer(limit_bytes: int | None) -> None:
    options = EngineOptions(
        max_sequences=2, threads=1, context_tokens=512, memory_limit_bytes=limit_bytes
    )
    engine = open_model("mlx-4bit", options)
    events = await run(engine, request(chat("Say hello."), max_tokens=6, logit_bias={2: -100.0}))
    assert len(token_ids_of(events)) == 6
    await engine.close()
