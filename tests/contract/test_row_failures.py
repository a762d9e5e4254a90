"""Rows that fail in a real runtime: weights that are not numbers, masks that raise."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Engine, EngineOptions
from backends.prompt.prepare import Prepared, Preparer
from backends.registry import load_backends
from core.errors import BrokenModel, NonFiniteOutput, RequestFailed
from core.types import GenerationRequest, TextDelta, TokenPrompt
from tests import onnx_files
from tests.gguf_files import bert_gguf, llama_gguf
from tests.requests import request, rounding, run, token_ids_of
from tests.unit.backends.engine.faulty import Panic

OPTIONS = EngineOptions(
    max_sequences=4, threads=1, context_tokens=128, kv_tokens=512, prefill_chunk_tokens=64
)
# The only token whose embedding `poison_token` spoils.
BAD_TOKEN, END_TOKEN = 9, 1
GOOD = TokenPrompt((5, 7, 30, 12, 8))
BAD = TokenPrompt((5, 7, BAD_TOKEN, 12))

Weights = dict[str, Any]
Spoil = Callable[[Weights], None]


# Names of the embedding, of a layer's weight and of the output's.
_HF_NAMES = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")
NAMES: dict[str, tuple[str, str, str]] = {
    "gguf": ("token_embd.weight", "blk.1.ffn_down.weight", "output.weight"),
    "safetensors": _HF_NAMES,
    "mlx": _HF_NAMES,
    "pytorch": _HF_NAMES,
    "onnx": ("embed", "last", "last"),
}


def write_gguf(folder: Path, spoil: Spoil) -> Path:
    return llama_gguf(folder / "tiny-F32.gguf", change=spoil)


def write_hf(folder: Path, spoil: Spoil, made_by: str = "pt") -> Path:
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(7)
    sizes = {name: value for name, value in onnx_files.CONFIG.items() if name != "model_type"}
    sizes["tie_word_embeddings"] = False
    config = transformers.AutoConfig.for_model("llama", **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: array * 4.0 for name, array in model.state_dict().items()}
    spoil(weights)
    save_file(weights, folder / "model.safetensors", {"format": made_by})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    onnx_files.write_tokenizer(folder)
    return folder / "model.safetensors"


def write_pytorch(folder: Path, spoil: Spoil) -> Path:
    import torch
    from safetensors.torch import load_file

    whole = write_hf(folder, spoil)
    torch.save(load_file(whole), folder / "pytorch_model.bin")
    whole.unlink()
    return folder / "pytorch_model.bin"


def write_mlx(folder: Path, spoil: Spoil) -> Path:
    return write_hf(folder, spoil, "mlx")


def write_onnx(folder: Path, spoil: Spoil) -> Path:
    from onnx import numpy_helper

    model = onnx_files.decoder()
    arrays = {each.name: numpy_helper.to_array(each).copy() for each in model.graph.initializer}
    last = [name for name in arrays if name.startswith("matrix_")][-1]
    spoil({**arrays, "last": arrays[last]})
    for each in model.graph.initializer:
        each.CopyFrom(numpy_helper.from_array(arrays[each.name], each.name))
    return onnx_files.write_folder(folder, model)


WRITERS: dict[str, Callable[[Path, Spoil], Path]] = {
    "gguf": write_gguf,
    "safetensors": write_hf,
    "mlx": write_mlx,
    "pytorch": write_pytorch,
    "onnx": write_onnx,
}


def open_engine(kind: str, path: Path, options: EngineOptions = OPTIONS) -> Engine:
    backend = load_backends()[kind]
    return backend.open(backend.identify(path), options)


def asked(prompt: TokenPrompt, **options: Any) -> GenerationRequest:
    ends = {END_TOKEN: -100.0, 2: -100.0, BAD_TOKEN: -100.0}
    return request(prompt, **{"max_tokens": 24, "logit_bias": ends, **options})


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1}, {"logit_bias": {}}])
@pytest.mark.parametrize("place", ["layer", "output"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", WRITERS)
async def test_weights_that_are_no_numbers_give_an_error_and_no_text(
    kind: str, value: float, place: str, sampling: dict[str, Any], tmp_path: Path
) -> None:

    def spoil(weights: Weights) -> None:
        weights[NAMES[kind][1 if place == "layer" else 2]][3] = value

    path = WRITERS[kind](tmp_path, spoil)
    if kind in ("mlx", "safetensors"):
        # The MLX engine, which opens both, computes a token while it loads a model.
        with pytest.raises(BrokenModel, match="NaN or infinity"):
            open_engine(kind, path)
        return
    engine = open_engine(kind, path)
    texts: list[TextDelta] = []

    async def collect() -> None:
        async for event in engine.generate(asked(GOOD, **sampling)):
            texts.extend([event] if isinstance(event, TextDelta) else [])

    with pytest.raises(NonFiniteOutput, match="NaN or infinity"):
        await collect()
    assert not texts
    assert not engine.is_failed
    await engine.close()


@pytest.mark.parametrize("sampling", [{}, {"logit_bias": {}, "temperature": 0.0}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", WRITERS)
async def test_a_row_that_overflows_ends_its_request_alone(
    kind: str, value: float, sampling: dict[str, Any], tmp_path: Path
) -> None:

    def spoil(weights: Weights) -> None:
        weights[NAMES[kind][0]][BAD_TOKEN] = value
        if kind != "onnx":
            # Its logit is 0, so the others' greedy text does not have it.
            weights[NAMES[kind][2]][BAD_TOKEN] = 0.0

    engine = open_engine(kind, WRITERS[kind](tmp_path, spoil))
    await assert_alone(engine, sampling)
    await engine.close()


async def assert_alone(engine: Engine, sampling: dict[str, Any]) -> None:
    """Run a bad request beside good ones and before others; those give what they give alone."""
    good = [asked(TokenPrompt((*GOOD.token_ids, last)), **sampling) for last in (20, 21)]
    alone = [token_ids_of(await run(engine, one)) for one in good]
    assert all(alone)
    beside = [asyncio.ensure_future(run(engine, replace(one, id=f"{one.id}b"))) for one in good]
    for _ in range(2):
        with pytest.raises(NonFiniteOutput):
            await run(engine, asked(BAD, **sampling))
    assert [token_ids_of(events) for events in await asyncio.gather(*beside)] == alone
    again = [token_ids_of(await run(engine, replace(one, id=f"{one.id}c"))) for one in good]
    assert again == alone
    assert not engine.is_failed


@pytest.mark.parametrize("flash_attention", [0, 1])
async def test_cells_of_a_row_that_overflows_spoil_no_other_row(
    flash_attention: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without flash attention llama.cpp reads the cells of all rows, with a weight of zero."""
    from backends.gguf.model import library

    llama = library()
    open_context = llama.llama_init_from_model

    def with_attention(model: Any, params: Any) -> Any:
        params.flash_attn_type = flash_attention
        return open_context(model, params)

    monkeypatch.setattr(llama, "llama_init_from_model", with_attention)

    def spoil(weights: Weights) -> None:
        weights["token_embd.weight"][BAD_TOKEN] = np.nan

    engine = open_engine("gguf", write_gguf(tmp_path, spoil))
    await assert_alone(engine, {})
    # One that is cancelled while it computes leaves its cells behind.
    long_bad = TokenPrompt((*BAD.token_ids * 20, *GOOD.token_ids))
    for _ in range(3):
        leaving = asyncio.ensure_future(run(engine, asked(long_bad)))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await assert_alone(engine, {})
    await engine.close()


def write_encoder(folder: Path) -> Path:
    from onnx import numpy_helper

    model = onnx_files.encoder()
    for each in model.graph.initializer:
        if each.name == "embed":
            array = numpy_helper.to_array(each).copy()
            array[BAD_TOKEN] = np.nan
            each.CopyFrom(numpy_helper.from_array(array, each.name))
    return onnx_files.write_folder(folder, model, config=onnx_files.ENCODER_CONFIG)


def write_bert(folder: Path) -> Path:
    def spoil(weights: Weights) -> None:
        weights["token_embd.weight"][BAD_TOKEN] = np.nan

    return bert_gguf(folder / "bert-F32.gguf", change=spoil)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
async def test_vectors_that_are_no_numbers_are_an_error_of_their_own_request(
    kind: str, tmp_path: Path
) -> None:
    writer = write_bert if kind == "gguf" else write_encoder
    engine = open_engine(kind, writer(tmp_path))
    good = [[5, 7, 8], [6, 10, 11, 12]]
    alone = [(await engine.embed([ids])).vectors[0] for ids in good]
    requests = [engine.embed([good[0]]), engine.embed([[5, BAD_TOKEN]]), engine.embed([good[1]])]
    first, bad, second = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(bad, NonFiniteOutput)
    for result, vector in ((first, alone[0]), (second, alone[1])):
        assert not isinstance(result, BaseException)
        near = rounding(1e-5, metal=1e-3)
        np.testing.assert_allclose(result.vectors[0], vector, atol=near)
    await engine.close()


class FailingMask:
    """Allows two tokens; raises where it is told, or allows none at its third token."""

    is_active = True
    problem = ""

    def __init__(self, place: str, error: BaseException | None) -> None:
        self._place, self._error = place, error
        self._accepted = 0

    def apply(self, logits: Any) -> None:
        """Mask all tokens but two."""
        if self._accepted == 2:
            self._fail("apply")
        allowed = logits[[7, 8]].copy()
        logits[:] = -np.inf
        if self._place != "nothing allowed" or self._accepted < 2:
            logits[[7, 8]] = allowed

    def accept(self, token_id: int) -> None:
        """Count the token."""
        assert token_id in (7, 8)
        self._accepted += 1
        if self._accepted == 2:
            self._fail("accept")

    def _fail(self, place: str) -> None:
        if self._place == place and self._error is not None:
            raise self._error


@pytest.mark.parametrize("place", ["apply", "accept", "nothing allowed"])
@pytest.mark.parametrize("error", [ValueError("the grammar died"), Panic("the grammar died")])
@pytest.mark.parametrize("kind", WRITERS)
async def test_a_mask_that_fails_ends_its_request_alone(
    kind: str, place: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_prepare = Preparer.prepare

    def prepare(preparer: Preparer, wanted: GenerationRequest) -> Prepared:
        prepared = real_prepare(preparer, wanted)
        if wanted.id == "masked":
            prepared.mask = FailingMask(place, error)
        return prepared

    monkeypatch.setattr(Preparer, "prepare", prepare)
    engine = open_engine(kind, WRITERS[kind](tmp_path, lambda _: None))
    good = asked(GOOD)
    alone = token_ids_of(await run(engine, good))
    beside = asyncio.ensure_future(run(engine, replace(good, id="beside")))
    expected = "No token may come next" if place == "nothing allowed" else "the grammar died"
    with pytest.raises(RequestFailed, match=expected):
        await run(engine, replace(asked(BAD), id="masked"))
    assert token_ids_of(await beside) == alone
    assert token_ids_of(await run(engine, replace(good, id="after"))) == alone
    assert not engine.is_failed
    await engine.close()
