"""Architectures that a runtime computes wrongly give transformers' own text, or run otherwise."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")

from backends.base import Engine, EngineOptions, RuntimeChoice  # noqa: E402
from backends.mlx.backend import MlxBackend  # noqa: E402
from backends.registry import load_backends  # noqa: E402
from backends.trials import TrialFolder, TrialOptions  # noqa: E402
from core.types import TokenPrompt  # noqa: E402
from tests.requests import request, run, token_ids_of  # noqa: E402

pytestmark = pytest.mark.asyncio(loop_scope="module")

VOCABULARY, WINDOW, TOKENS = 128, 24, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Architecture, what its configuration adds, the runtime that serves it, and its rows at once.
KINDS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "right": ("qwen2", {}, "mlx", 4),
    "partial rotary": ("glm", {}, "pytorch", 4),
    "window": ("mistral", {"sliding_window": WINDOW}, "pytorch", 4),
    "masks of one row": ("gemma2", {"query_pre_attn_scalar": 16}, "mlx", 1),
    "state of one row": ("mamba", {"state_size": 8}, "mlx", 1),
    "unknown to MLX": ("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8}, "pytorch", 4),
}
PROMPTS = [[5, 9, 33, 17], [11, 12] * 15, [(7 * i) % 100 + 3 for i in range(90)], [40]]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))


def write_model(folder: Path, kind: str) -> list[list[int]]:
    """Write a random model; return what transformers generates for each prompt."""
    name, more, _, _ = KINDS[kind]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        # Larger weights than those of training's start: attention must matter.
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS)
        wanted.append(found[0, len(prompt) :].tolist())
    return wanted


def open_model(folder: Path, trials: Path) -> Engine:
    """Open the model on MLX, whatever its scan would choose, unless MLX does not know it."""
    backends = load_backends()
    backend, mlx = backends["safetensors"], backends["mlx"]
    info = backend.identify(folder / "model.safetensors")
    if isinstance(mlx, MlxBackend) and mlx.supports(info.architecture):
        info = replace(info, choice=RuntimeChoice("mlx", "the test wants it", "pytorch"))
    options = EngineOptions(
        max_sequences=4,
        threads=1,
        context_tokens=256,
        kv_tokens=2048,
        prefill_chunk_tokens=32,
        trial=TrialOptions(TrialFolder(trials)),
    )
    return backend.open(info, options)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=sorted(KINDS))
async def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[str, Engine, list[list[int]]]]:
    """A kind of model, its engine, and the right tokens."""
    folder = tmp_path_factory.mktemp("model")
    wanted = write_model(folder, request.param)
    engine = open_model(folder, folder / "trials")
    yield request.param, engine, wanted
    await engine.close()


async def test_the_text_is_that_of_transformers_alone_and_together(
    served: tuple[str, Engine, list[list[int]]],
) -> None:
    kind, engine, wanted = served
    asked = [request(TokenPrompt(tuple(ids)), max_tokens=TOKENS) for ids in PROMPTS]
    alone = [token_ids_of(await run(engine, each)) for each in asked]
    again = [token_ids_of(await run(engine, replace(each, id=f"{each.id}-2"))) for each in asked]
    together = await asyncio.gather(
        *(run(engine, replace(each, id=f"{each.id}-3")) for each in asked)
    )
    assert alone == wanted, kind
    assert again == wanted, kind
    assert [token_ids_of(each) for each in together] == wanted, kind


async def test_what_is_done_otherwise_is_told(
    served: tuple[str, Engine, list[list[int]]],
) -> None:
    kind, engine, _ = served
    _, _, runtime, rows = KINDS[kind]
    assert engine.info.choice is not None
    assert engine.info.choice.runtime == runtime
    assert engine.max_sequences == rows
    assert bool(engine.limitations) == (kind not in ("right", "unknown to MLX"))


async def test_a_wrong_model_is_opened_on_the_other_runtime_at_once_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, "partial rotary")
    first = open_model(tmp_path, tmp_path / "trials")
    await first.close()
    kept = sorted((tmp_path / "trials").iterdir())
    # One result for each runtime.
    assert len(kept) == 2
    monkeypatch.setattr("backends.mlx.backend.MlxModel", None)
    second = open_model(tmp_path, tmp_path / "trials")
    assert second.limitations == first.limitations
    await second.close()
    assert sorted((tmp_path / "trials").iterdir()) == kept
