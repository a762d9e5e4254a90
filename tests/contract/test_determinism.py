"""With the setting `deterministic`, an answer depends on its request alone, in every format.

Without it only what `test_backend.py` checks holds: the same tokens but for near ties.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from backends.base import Engine, EngineOptions, RuntimeChoice
from backends.gguf.backend import GgufBackend
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.registry import load_backends
from catalog.models import ModelSettings
from core.types import (
    ChatMessage,
    ChatPrompt,
    Finished,
    GenerationEvent,
    GenerationRequest,
    TextDelta,
    TokenLogprob,
    TokenPrompt,
)
from tests.contract.conftest import OPTIONS
from tests.gguf_files import gemma2_gguf, llama_gguf, mamba_gguf
from tests.models import open_variant, weights_of
from tests.prefixes import place_in, store_at
from tests.requests import chat, end_of, request, run, text_of
from tests.tiny_folders import write_model

pytestmark = pytest.mark.asyncio(loop_scope="session")


PIECE = 64
# The whole distribution is sampled, so that the smallest difference changes a token sooner.
SEEDED: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 2**40 + 7,
}
FACTS = "The sea is wide, moves with the wind and the moon, and joins many lands. "
LONG = FACTS * 5
wanted = partial(request, max_tokens=8, top_logprobs=0)
REQUESTS = {
    "short": partial(wanted, chat("Tell me a story about a fox."), **SEEDED),
    "long": partial(wanted, chat(f"{LONG} Tell me more about it."), **SEEDED),
    "completion": partial(wanted, f"{LONG} And so", **SEEDED),
    "greedy": partial(wanted, f"{LONG} And then"),
}

KINDS: dict[str, Callable[[Path], Path]] = {
    "llama": llama_gguf,
    "gemma2-window": gemma2_gguf,
    "mamba-recurrent": mamba_gguf,
}
# Classes of transformers, with settings of their configurations.
FOLDERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 64},
    "Mamba": {"intermediate_size": 128, "state_size": 8},
}

Outcome = list[TokenLogprob]


def outcome(events: Sequence[GenerationEvent]) -> Outcome:
    """Return each token with its exact log-probability."""
    found = [one for each in events if isinstance(each, TextDelta) for one in each.logprobs]
    assert found
    return found


class Model:
    """A model that can be opened anew with the setting, as often as a test needs it."""

    def __init__(self, open_with: Callable[[EngineOptions], Engine], context_tokens: int) -> None:
        self._open = open_with
        self._context_tokens = context_tokens

    @asynccontextmanager
    async def opened(self, **changes: Any) -> AsyncIterator[Engine]:
        """Open it, with the options that the setting and `changes` give."""
        usual = {"prefill_chunk_tokens": PIECE, "prefix_bytes": 1 << 28}
        context = {"context_tokens": self._context_tokens}
        options = replace(OPTIONS, **{**usual, **context, **changes})
        engine = self._open(ModelSettings(deterministic=True).applied_to(options))
        try:
            yield engine
        finally:
            await engine.close()

    async def alone(self, one: GenerationRequest) -> Outcome:
        """Return what an engine gives for the first request of its life."""
        async with self.opened() as engine:
            return outcome(await run(engine, one))

    async def expected(self) -> dict[str, Outcome]:
        """Return what each of the requests gets alone."""
        return {name: await self.alone(make()) for name, make in REQUESTS.items()}


def model_of(variant: str) -> Model:
    """Return the starter in a format."""
    if variant in ("mlx-f32", "safetensors"):
        pytest.skip("mlx-4bit is the same engine, and tiny models have its other kinds of caches")
    # A token of the echo model is a byte, so the same text needs more of them.
    context = 2048 if variant == "echo" else OPTIONS.context_tokens
    assert context is not None
    return Model(partial(open_variant, variant), context)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def expected(variant: str) -> dict[str, Outcome]:
    return await model_of(variant).expected()


async def abandon(engine: Engine, one: GenerationRequest) -> None:
    """Leave a request half-finished."""
    events = engine.generate(one)
    async for event in events:
        if isinstance(event, TextDelta):
            break
    await events.aclose()


def earlier_requests() -> list[GenerationRequest]:
    """Return requests that leave something in the cache; those of large models are the first."""
    return [
        request("word " * 100, max_tokens=8),
        request(f"{LONG} And so what", max_tokens=20),
        request(f"{LONG} And so what", max_tokens=4, prompt_logprobs=0),
        request(chat("hi"), max_tokens=20),
        request(chat(f"{LONG[:330]} Is that so?"), max_tokens=8),
        replace(request(f"{LONG} And so", max_tokens=4), reads_cache=False),
        request(chat(f"{LONG} Tell me more about it. Tell me all."), max_tokens=3),
    ]


async def check_earlier_requests(
    model: Model, expected: dict[str, Outcome], count: int | None = None
) -> None:
    async with model.opened() as engine:
        for before in earlier_requests()[:count]:
            await run(engine, before)
            for name, make in REQUESTS.items():
                assert outcome(await run(engine, make())) == expected[name], (name, before)
            await abandon(engine, replace(before, id=f"{before.id}-again"))


async def check_requests_beside(model: Model, expected: dict[str, Outcome]) -> None:
    async with model.opened() as engine:
        others = [request(chat(f"{LONG[: 90 * n]} {n}"), max_tokens=10) for n in range(3)]
        beside = asyncio.gather(*(run(engine, other) for other in others))
        names = [*REQUESTS, "long"]
        found = await asyncio.gather(*(run(engine, REQUESTS[name]()) for name in names))
        for name, events in zip(names, found, strict=True):
            assert outcome(events) == expected[name], name
        await beside


async def test_deterministic_answers_do_not_depend_on_earlier_requests(
    variant: str, expected: dict[str, Outcome]
) -> None:
    count = 1 if variant == "mlx-4bit" else 3
    await check_earlier_requests(model_of(variant), expected, count)


async def test_deterministic_answers_do_not_depend_on_others_at_the_same_time(
    variant: str, expected: dict[str, Outcome]
) -> None:
    await check_requests_beside(model_of(variant), expected)


async def test_a_deterministic_second_turn_is_that_of_a_new_engine(variant: str) -> None:
    def turn(text: str) -> GenerationRequest:
        first = ChatMessage("user", f"{LONG} Tell me more about it.")
        turns = (first, ChatMessage("assistant", text), ChatMessage("user", "And why?"))
        return wanted(ChatPrompt(turns), **SEEDED)

    model = model_of(variant)
    async with model.opened() as engine:
        first = await run(engine, REQUESTS["long"]())
        second = await run(engine, turn(text_of(first)))
    assert outcome(second) == await model.alone(turn(text_of(first)))
    prompt = end_of(first).usage.prompt_tokens
    if variant != "echo":
        # Models in MLX compute the prompt's last token apart.
        assert end_of(second).usage.cached_tokens in (
            prompt - prompt % PIECE,
            (prompt - 1) - (prompt - 1) % PIECE,
        )


async def test_a_crowded_deterministic_cache_changes_nothing(
    variant: str, expected: dict[str, Outcome]
) -> None:
    async with model_of(variant).opened(kv_tokens=512) as engine:
        for name, make in REQUESTS.items():
            await run(engine, request(f"{name} " * 150, max_tokens=4))
            assert outcome(await run(engine, make())) == expected[name], name


def opener(
    runtime: str, folder: Path, class_name: str = "Llama", **settings: Any
) -> Callable[[EngineOptions], Engine]:
    """Write a tiny model, and return what opens it."""
    if runtime == "gguf":
        gguf = GgufBackend()
        return partial(gguf.open, gguf.identify(llama_gguf(folder / "tiny.gguf")))
    settings = {"max_position_embeddings": 2048, **settings}
    path = weights_of(write_model(folder, class_name, **settings))
    backend = load_backends()["safetensors"]
    choice = RuntimeChoice(runtime, "the test wants it", "pytorch")
    return partial(backend.open, replace(backend.identify(path), choice=choice))


# PyTorch computes recurrent states token by token, which takes minutes here.
@pytest.mark.parametrize(
    ("runtime", "class_name"),
    [(r, c) for r in ("mlx", "pytorch") for c in FOLDERS if (r, c) != ("pytorch", "Mamba")],
)
async def test_deterministic_folders_may_have_windows_and_recurrent_states(
    runtime: str, class_name: str, tmp_path: Path
) -> None:
    model = Model(opener(runtime, tmp_path, class_name, **FOLDERS[class_name]), 1024)
    expected = await model.expected()
    await check_earlier_requests(model, expected)
    await check_requests_beside(model, expected)


@pytest.mark.parametrize("kind", list(KINDS))
async def test_deterministic_models_may_have_windows_and_recurrent_states(
    kind: str, tmp_path: Path
) -> None:
    path = KINDS[kind](tmp_path / f"{kind}.gguf")
    backend = GgufBackend()
    model = Model(lambda options: backend.open(backend.identify(path), options), 1024)
    expected = await model.expected()
    await check_earlier_requests(model, expected)
    await check_requests_beside(model, expected)


@pytest.mark.parametrize("runtime", ["gguf", "mlx", "pytorch"])
async def test_stored_prefixes_of_fixed_pieces_change_nothing(runtime: str, tmp_path: Path) -> None:
    open_with = opener(runtime, tmp_path)
    # A piece has two blocks, so that a damaged block may leave a part of a piece.
    model, piece = Model(open_with, 1024), 2 * BLOCK_TOKENS
    asked = partial(wanted, TokenPrompt((70, 71, 72, 73) * 160), **SEEDED)
    async with model.opened(prefill_chunk_tokens=piece) as engine:
        expected = outcome(await run(engine, asked()))

    async def ask(folder: Path, *, is_deterministic: bool = True) -> Finished:
        store = store_at(folder, size_bytes=1 << 30)
        if is_deterministic:
            place = place_in(store)
            async with model.opened(prefix_store=place, prefill_chunk_tokens=piece) as engine:
                events = await run(engine, asked())
            assert outcome(events) == expected
        else:
            engine = open_with(replace(OPTIONS, context_tokens=1024, prefix_store=place_in(store)))
            events = await run(engine, asked())
            await engine.close()
        store.close()
        return end_of(events)

    folder = tmp_path / "prefixes"
    for is_deterministic in (False, True):
        # What another engine left is not used.
        assert (await ask(folder, is_deterministic=is_deterministic)).usage.cached_tokens == 0
    assert (await ask(folder)).usage.cached_tokens == 4 * BLOCK_TOKENS
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path.relative_to(folder) for path in found if path.stat().st_size > BLOCK_TOKENS]
    reused = set()
    for index, path in enumerate(files):
        damaged = tmp_path / f"damaged-{index}"
        shutil.copytree(folder, damaged)
        content = bytearray((damaged / path).read_bytes())
        content[-40] ^= 1
        (damaged / path).write_bytes(content)
        reused.add((await ask(damaged)).usage.cached_tokens)
    assert 0 in reused
    assert reused <= {0, piece, 2 * piece}
