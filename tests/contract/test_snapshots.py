"""Computed prefixes outlive their engine: a reopened model goes on as if it had never closed."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import Engine, EngineOptions
from backends.gguf.backend import GgufBackend
from backends.gguf.batch import Batch
from backends.gguf.blocks import CellBlocks
from backends.gguf.model import GgufModel, library, open_context
from backends.gguf.slots import KvSlots
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.store import BlockStore
from core.types import PrefillProgress
from tests.gguf_files import gemma2_gguf, llama_gguf
from tests.golden import golden
from tests.models import GOLDEN, open_variant
from tests.prefixes import place_in, store_at
from tests.requests import assert_same_tokens, end_of, request, run, text_of, token_ids_of

VARIANTS = ("gguf", "gguf-f32", "mlx-f32", "onnx-f32", "onnx-plain", "pytorch-bin")
OPTIONS = EngineOptions(max_sequences=4, threads=1, context_tokens=1024, kv_tokens=4096)
PROMPT = " ".join(
    f"Item {n} is worth {n * 7 % 13} coins and weighs {n % 11} stones." for n in range(20)
)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """A format with its real model, which is built before any event loop runs."""
    name = str(request.param)
    if name in GOLDEN:
        golden(GOLDEN[name])
    return name


async def test_a_reopened_model_goes_on_with_the_same_text(variant: str, tmp_path: Path) -> None:
    asked = request(PROMPT, max_tokens=16, top_logprobs=2)
    plain = open_variant(variant, OPTIONS)
    undisturbed = await run(plain, asked)
    await plain.close()

    store = store_at(tmp_path, size_bytes=1 << 30)
    first = open_variant(variant, replace(OPTIONS, prefix_store=place_in(store)))
    assert end_of(await run(first, asked)).usage.cached_tokens == 0
    await first.close()
    store.close()

    store = store_at(tmp_path, size_bytes=1 << 30)
    again = open_variant(variant, replace(OPTIONS, prefix_store=place_in(store)))
    events = await run(again, asked)
    end = end_of(events)
    assert end.usage.cached_tokens == end.usage.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS > 0
    assert end.cache is not None
    assert (end.cache.disk_tokens, end.cache.miss) == (end.usage.cached_tokens, None)
    if variant.endswith(("f32", "bin", "plain")):
        assert text_of(events) == text_of(undisturbed)
    else:
        assert_same_tokens(undisturbed, events, tie=0.5)
    await again.close()
    store.close()


def open_tiny(path: Path, store: BlockStore | None, **options: Any) -> Engine:
    backend = GgufBackend()
    chosen = replace(OPTIONS, prefix_store=None if store is None else place_in(store))
    return backend.open(backend.identify(path), replace(chosen, **options))


async def test_ram_serves_where_nothing_is_written(tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "tiny.gguf")
    store = store_at(tmp_path / "prefixes", ram_bytes=1 << 26, size_bytes=0)
    answers = []
    for _ in range(2):
        engine = open_tiny(path, store)
        answers.append(await run(engine, request("a b c " * 150, max_tokens=12)))
        await engine.close()
    assert token_ids_of(answers[0]) == token_ids_of(answers[1])
    cache = end_of(answers[1]).cache
    assert cache is not None
    assert cache.ram_tokens > 0
    assert cache.disk_tokens == 0
    store.close()


async def test_restored_rows_run_beside_others_where_cells_are_few(tmp_path: Path) -> None:
    """Two prompts that do not fit together: one waits, and both say what they say alone."""
    path = llama_gguf(tmp_path / "tiny.gguf")
    prompts = [request(f"{word} " * 300, max_tokens=12) for word in ("ab", "cd", "ef")]
    plain = open_tiny(path, None)
    alone = [await run(plain, each) for each in prompts]
    await plain.close()
    store = store_at(tmp_path / "prefixes")
    for _ in range(2):
        engine = open_tiny(path, store, kv_tokens=1280)
        found = await asyncio.gather(*(run(engine, each) for each in prompts))
        for wanted, events in zip(alone, found, strict=True):
            assert token_ids_of(events) == token_ids_of(wanted)
        await engine.close()
    assert sum(end_of(events).usage.cached_tokens for events in found) > 0
    store.close()


async def test_a_sliding_window_is_never_restored_in_parts(tmp_path: Path) -> None:
    path = gemma2_gguf(tmp_path / "tiny.gguf")
    store = store_at(tmp_path / "prefixes")
    for _ in range(2):
        engine = open_tiny(path, store)
        end = end_of(await run(engine, request("a b c " * 100, max_tokens=4)))
        assert end.usage.cached_tokens == 0
        await engine.close()
    store.close()


async def test_a_server_that_is_killed_while_it_writes_leaves_nothing_broken(
    tmp_path: Path,
) -> None:
    path = llama_gguf(tmp_path / "tiny.gguf")
    code = (
        "import asyncio, os, signal, sys\nfrom pathlib import Path\n"
        "from tests.contract.test_snapshots import open_tiny\n"
        "from tests.prefixes import store_at\nfrom tests.requests import request, run\n"
        "real, written = os.write, []\n"
        "def write(file, data):\n"
        "    written.append(len(data))\n"
        "    if len(written) == 6:\n"
        "        real(file, data[: len(data) // 2])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(file, data)\n"
        "async def main(path, home):\n"
        "    engine = open_tiny(path, store_at(home))\n"
        "    os.write = write\n"
        "    await run(engine, request('a b c ' * 150, max_tokens=12))\n"
        "    await engine.close()\n"
        "asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))\n"
    )
    home = tmp_path / "prefixes"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(home)],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    plain = open_tiny(path, None)
    asked = request("a b c " * 150, max_tokens=12)
    wanted = token_ids_of(await run(plain, asked))
    await plain.close()
    store = store_at(home)
    engine = open_tiny(path, store)
    events = await run(engine, asked)
    assert token_ids_of(events) == wanted
    assert list(home.rglob("*.tmp")) == []
    await engine.close()
    store.close()


async def test_a_short_request_passes_a_long_prompt(tmp_path: Path) -> None:
    """While a long prompt is computed in small pieces, a short one is answered whole."""
    path = llama_gguf(tmp_path / "tiny.gguf")
    engine = open_tiny(path, None, prefill_chunk_tokens=16)
    began = asyncio.Event()
    long_is_done = False

    async def ask_long() -> None:
        nonlocal long_is_done
        done = []
        async for event in engine.generate(request("a b c " * 160, max_tokens=1)):
            if isinstance(event, PrefillProgress):
                done.append(event.done_tokens)
                began.set()
        long_is_done = True
        assert done == sorted(set(done))
        assert len(done) > 10

    work = asyncio.ensure_future(ask_long())
    await began.wait()
    await run(engine, request("Hi", max_tokens=1))
    assert not long_is_done
    await work
    await engine.close()


@pytest.mark.parametrize("first", [None, "f32"])
async def test_blocks_belong_to_the_kv_type_that_they_were_computed_with(
    first: str | None, tmp_path: Path
) -> None:
    """Each type finds its own blocks and never those of the other, which drop nothing either."""
    path = llama_gguf(tmp_path / "tiny.gguf")
    store = store_at(tmp_path / "prefixes")
    second = "f32" if first is None else None
    texts: dict[str | None, list[int]] = {}
    for round_number, kv_type in enumerate([first, second, first, second]):
        engine = open_tiny(path, store, kv_type=kv_type)
        events = await run(engine, request("a b c " * 150, max_tokens=12))
        end = end_of(events)
        assert end.cache is not None
        if round_number < 2:
            texts[kv_type] = token_ids_of(events)
            reason = "other_model_version" if round_number else "no_snapshot"
            assert (end.usage.cached_tokens, end.cache.miss) == (0, reason)
        else:
            assert (end.cache.disk_tokens > 0, end.cache.miss) == (True, None)
            assert token_ids_of(events) == texts[kv_type]
        await engine.close()
    store.close()


async def test_a_block_that_llama_refuses_is_written_again_and_drops_no_other_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the layout had not told the types apart: llama.cpp itself refuses the bytes."""
    path = llama_gguf(tmp_path / "tiny.gguf")
    store = store_at(tmp_path / "prefixes")
    dropped: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("backends.gguf.stepper.block_layout", lambda *_: "one for all")
        for kv_type in (None, "f32"):
            engine = open_tiny(path, store, kv_type=kv_type)
            if kv_type is not None:
                await run(engine, request("d e f " * 150, max_tokens=4))
                patch.setattr(KvSlots, "drop_oldest", lambda _: dropped.append(1))
            end = end_of(await run(engine, request("a b c " * 150, max_tokens=4)))
            await engine.close()
        assert end.cache is not None
        assert (end.usage.cached_tokens, end.cache.miss, dropped) == (0, "damaged", [])
        engine = open_tiny(path, store, kv_type="f32")
        end = end_of(await run(engine, request("a b c " * 150, max_tokens=4)))
        assert end.cache is not None
        assert (end.cache.disk_tokens > 0, end.cache.miss) == (True, None)
        await engine.close()
    store.close()


def test_llama_still_tells_missing_cells_from_a_refusal(tmp_path: Path) -> None:
    """Retained prefixes give way to a block that lacks room, not to one that is refused."""
    path = llama_gguf(tmp_path / "tiny.gguf")

    def blocks(kv_type: str | None) -> tuple[GgufModel, Any, CellBlocks]:
        model = GgufModel(path)
        context = open_context(model, replace(OPTIONS, kv_tokens=256, kv_type=kv_type), 4)
        return model, context, CellBlocks(context, 3)

    model, context, plain = blocks(None)
    batch = Batch(BLOCK_TOKENS)
    batch.add(0, 0, [5] * BLOCK_TOKENS, logits=False)
    assert library().llama_decode(context, batch.native) == 0
    state = plain.copy(0, 0)
    assert plain.restore(1, state)
    assert not plain.restore(2, state)
    assert plain.lacks_room is True
    other_model, other_context, other = blocks("f32")
    assert not other.restore(0, state)
    assert other.lacks_room is False
    assert not other.restore(0, state[: state.nbytes // 2].copy())
    assert other.lacks_room is not True
    for each in (context, other_context):
        library().llama_free(each)
    model.close()
    other_model.close()
