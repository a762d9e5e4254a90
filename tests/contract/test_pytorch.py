"""What the PyTorch engine does with the starter's weights, and safetensors folders on it."""

import asyncio
import gc
import shutil
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("torch")

from backends.base import Engine, EngineOptions, RuntimeChoice
from backends.pytorch.backend import PytorchBackend
from backends.registry import load_backends
from core.errors import (
    BrokenModel,
    EngineFailed,
    InsufficientMemory,
    RequestError,
)
from core.types import JsonOutput, PrefillProgress, TextDelta, TokenPrompt
from tests.golden import golden, reference
from tests.requests import (
    METAL_TIE,
    assert_same_tokens,
    chat,
    end_of,
    request,
    rounding,
    run,
    text_of,
    token_ids_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS = EngineOptions(max_sequences=8, threads=1, context_tokens=1024, kv_tokens=4096)
STORY = "Once upon a time there was a small harbour town by the grey sea, and in it "


def open_golden(kind: str, options: EngineOptions = OPTIONS) -> Engine:
    """Open the starter's weights on PyTorch, whatever else could run them."""
    folder = golden(kind)
    if kind == "hf-f32":
        backend = load_backends()["safetensors"]
        info = backend.identify(folder / "model.safetensors")
        info = replace(info, choice=RuntimeChoice("pytorch", "for this test"))
        return backend.open(info, options)
    name = "model.pt" if kind == "pt" else "pytorch_model.bin"
    torch_backend = PytorchBackend()
    return torch_backend.open(torch_backend.identify(folder / name), options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    """The starter as pytorch_model.bin."""
    engine = open_golden("pytorch")
    yield engine
    await engine.close()


async def assert_reference(engine: Engine) -> None:
    """Compare greedy tokens, alone and together, up to where the model ends its answer."""
    wanted = reference()

    def asked(ids: tuple[int, ...]) -> Any:
        return request(TokenPrompt(ids), max_tokens=len(wanted.tokens[0]))

    alone = [await run(engine, asked(ids)) for ids in wanted.ids]
    together = await asyncio.gather(*(run(engine, asked(ids)) for ids in wanted.ids))
    for tokens, one, other in zip(wanted.tokens, alone, together, strict=True):
        found = token_ids_of(one)
        assert len(found) == len(tokens) or end_of(one).reason == "stop"
        assert found == tokens.first(len(found))
        assert token_ids_of(other) == tokens.first(len(found))


async def test_the_tokens_are_the_reference_alone_and_together(engine: Engine) -> None:
    await assert_reference(engine)


@pytest.mark.parametrize("kind", ["hf-f32", "pt"])
async def test_every_file_layout_gives_the_same_tokens(kind: str) -> None:
    engine = open_golden(kind)
    await assert_reference(engine)
    await engine.close()


async def test_a_conversation_is_not_computed_again(engine: Engine) -> None:
    first = await run(engine, request(STORY, max_tokens=16))
    prompt = STORY + text_of(first)
    second = await run(engine, request(prompt, max_tokens=4))
    assert end_of(second).usage.cached_tokens >= end_of(first).usage.prompt_tokens


async def test_a_cached_prefix_changes_no_token(engine: Engine) -> None:
    wanted = request(STORY * 3 + "lived a cat", max_tokens=12, top_logprobs=2)
    first = await run(engine, wanted)
    again = await run(engine, replace(wanted, id="again"))
    assert end_of(again).usage.cached_tokens > 0
    assert_same_tokens(first, again)


async def test_more_text_than_the_cache_holds_waits_and_nothing_fails() -> None:
    engine = open_golden(
        "pytorch", EngineOptions(max_sequences=4, threads=1, context_tokens=128, kv_tokens=160)
    )
    prompts = [request(f"{index}: {STORY}", max_tokens=40, top_logprobs=2) for index in range(4)]
    alone = [await run(engine, prompt) for prompt in prompts]
    together = await asyncio.gather(*(run(engine, prompt) for prompt in prompts))
    assert engine.load().preemptions > 0
    for one, other in zip(alone, together, strict=True):
        assert_same_tokens(one, other)
    await engine.close()


async def test_cancelling_ends_one_sequence_and_no_other(engine: Engine) -> None:
    stopped = engine.generate(request(STORY, max_tokens=500))
    other = asyncio.ensure_future(run(engine, request("The sea is", max_tokens=12)))
    async for event in stopped:
        if isinstance(event, TextDelta):
            break
    await stopped.aclose()
    assert end_of(await other).usage.completion_tokens == 12
    await run(engine, request("hello", max_tokens=1))
    assert engine.load().running == 0


async def test_json_is_enforced(engine: Engine) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = request(chat("Describe a cat."), max_tokens=60, output=JsonOutput(schema))
    assert text_of(await run(engine, wanted)).startswith('{"name": "')


async def test_a_token_bias_is_honoured(engine: Engine) -> None:
    events = await run(engine, request(STORY, max_tokens=5, logit_bias={1000: 100.0}))
    assert token_ids_of(events) == [1000] * 5
    with pytest.raises(RequestError, match="logit_bias"):
        await run(engine, request(STORY, logit_bias={10**6: 1.0}))


async def test_closing_gives_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.pytorch import loading as pytorch_engine

    kept: list[weakref.ref[Any]] = []

    def remembered(*arguments: Any) -> Any:
        model = load(*arguments)
        kept.append(weakref.ref(model))
        return model

    load = pytorch_engine.load_model
    monkeypatch.setattr(pytorch_engine, "load_model", remembered)
    engine = open_golden("pytorch")
    running = asyncio.ensure_future(run(engine, request(STORY, max_tokens=500)))
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineFailed):
        await running
    gc.collect()
    assert kept[0]() is None
    await engine.close()


async def test_the_context_is_lowered_to_the_memory_there_is() -> None:
    backend = PytorchBackend()
    info = backend.identify(golden("pytorch") / "pytorch_model.bin")
    whole = backend.estimate(info, EngineOptions())
    assert whole.context_tokens == info.context_length
    limit = whole.weights_bytes + whole.transient_bytes + whole.kv_bytes // 8
    less = backend.estimate(info, EngineOptions(memory_limit_bytes=limit))
    assert 0 < less.context_tokens < whole.context_tokens
    assert less.total_bytes <= limit
    with pytest.raises(InsufficientMemory):
        backend.open(info, EngineOptions(memory_limit_bytes=whole.weights_bytes))


async def test_half_precision_weights_are_computed_in_what_the_machine_is_good_at(
    tmp_path: Path,
) -> None:
    import torch

    source = golden("pytorch")
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True, mmap=True)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.bin"))
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        path = tmp_path / "pytorch_model.bin"
        torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
        info = PytorchBackend().identify(path)
        assert info.quantization == word
        engine = PytorchBackend().open(info, OPTIONS)
        events = await run(engine, request(chat("What is gravity?"), max_tokens=8))
        assert text_of(events).startswith("Gravity is a fundamental")
        await engine.close()


async def test_a_truncated_file_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    source = golden("pytorch")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    backend = PytorchBackend()
    info = backend.identify(tmp_path / "pytorch_model.bin")
    with (tmp_path / "pytorch_model.bin").open("r+b") as file:
        file.truncate(info.size_bytes // 2)
    with pytest.raises(BrokenModel):
        backend.open(info, OPTIONS)


async def test_log_probabilities_of_a_prompt_are_those_of_transformers() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = reference().ids[0]
    model = AutoModelForCausalLM.from_pretrained(golden("hf-f32"), dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    wanted = [float(logits[place, token]) for place, token in enumerate(ids[1:])]
    engine = open_golden("hf-f32")
    try:
        events = await run(engine, request(TokenPrompt(ids), max_tokens=0, prompt_logprobs=1))
    finally:
        await engine.close()
    found = [each.logprobs for event in events if isinstance(each := event, PrefillProgress)][-1]
    assert [token.token_id for token in found] == list(ids)
    assert [token.logprob for token in found[1:]] == pytest.approx(
        wanted, abs=rounding(1e-3, metal=METAL_TIE)
    )
