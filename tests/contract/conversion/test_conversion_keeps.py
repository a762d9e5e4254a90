"""Conversions of models of several architectures keep the text, the tokenizer and the settings."""

import asyncio
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from backends.base import EngineOptions, ModelInfo
from backends.gguf.backend import GgufBackend, recommended_sampling
from backends.gguf.file import gguf_info
from backends.gguf.header import read_gguf
from backends.hf.tokenizer import HfTokenizer
from backends.mlx.file import mlx_info
from backends.onnx.info import onnx_info
from catalog.convert.child import run_step
from catalog.convert.job import Job
from catalog.convert.run import ConversionRequest, convert
from catalog.convert.sidecars import sidecar_files
from catalog.convert.steps.gguf_tokenizer import gguf_vocabulary
from catalog.convert.steps.rotary import llama3_factors
from core.errors import Unavailable, UnsupportedCapability
from core.types import Capability, TokenPrompt
from core.units import MIB
from tests.contract.conversion.test_conversion import (
    Forward,
    mlx_greedy,
    onnx_greedy,
    torch_greedy,
)
from tests.gguf_files import llama_gguf, qwen2_gguf
from tests.requests import request, run, token_ids_of
from tests.starter import starter_path
from tests.tiny_folders import LLAMA3, SIDECARS, greedy_tokens, write_model

pytestmark = pytest.mark.timeout(300)

_TOKENS = 12
_WINDOW = 48
# What a process holds of libraries: PyTorch, transformers and a runtime.
_LIBRARIES_BYTES = 480 * MIB
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "mistral-window": ("Mistral", {"sliding_window": _WINDOW}),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build each model when it is first used."""
    root = tmp_path_factory.mktemp("sources")

    def source(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            class_name, settings = _MODELS[name]
            write_model(folder, class_name, **settings)
            # What transformers takes for granted is left out, as older exporters do.
            path = folder / "config.json"
            config = json.loads(path.read_text())
            if config["tie_word_embeddings"] is False:
                del config["tie_word_embeddings"]
            path.write_text(json.dumps(config))
        return folder

    return source


def info_of(folder: Path, format: str = "safetensors") -> ModelInfo:
    weights = sorted(folder.glob("*.safetensors"))
    files = [*weights, *(path for path in sorted(folder.glob("*.json")) if path.is_file())]
    config = json.loads((folder / "config.json").read_text())
    return ModelInfo(
        format=format,
        name="tiny",
        architecture=config["model_type"],
        quantization="f32",
        files=tuple(path.absolute() for path in files),
        size_bytes=sum(path.stat().st_size for path in weights),
        parameters=200_000,
        context_length=512,
        capabilities=frozenset({Capability.CHAT, Capability.COMPLETION}),
    )


def step(source: Path, formats: str, quantization: str, output: Path) -> Path:
    """Run one step in this process, which has imported the libraries already."""
    start, end = formats.split("-")
    work = output.with_name(f"{output.name}.work")
    work.mkdir(parents=True)
    output.mkdir()
    files = (source,) if source.is_file() else info_of(source).files
    job = Job(start, end, files, output, work, output.name, quantization)
    with warnings.catch_warnings():
        # Exporters warn of what they deprecate.
        warnings.simplefilter("ignore")
        run_step(job, lambda _fraction, _doing: None)
    return output


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = HfTokenizer(folder)
    text = "the theatre in an other hinterland <|im_start|> <tool> and then there "
    ids = tokenizer.encode(text * 3, add_bos=False, parse_special=True)
    # With the answer, both end before the window does.
    return [ids[:4], ids[: _WINDOW - _TOKENS - 2]]


def answers(start: Callable[[], Forward], given: Sequence[Sequence[int]]) -> list[list[int]]:
    found = []
    for ids in given:
        forward = start()
        answer = [forward(ids)]
        while len(answer) < _TOKENS:
            answer.append(forward(answer[-1:]))
        found.append(answer)
    return found


async def gguf_answers(path: Path, given: Sequence[Sequence[int]]) -> list[list[int]]:
    backend = GgufBackend()
    options = EngineOptions(max_sequences=1, context_tokens=_WINDOW, kv_tokens=256)
    engine = backend.open(backend.identify(path), options)
    try:
        return [
            token_ids_of(await run(engine, request(TokenPrompt(tuple(ids)), max_tokens=_TOKENS)))
            for ids in given
        ]
    finally:
        await engine.close()


def is_same_until_an_end(found: list[list[int]], wanted: list[list[int]]) -> bool:
    """Whether answers are equal up to the token that ended them."""
    return all(one and one == other[: len(one)] for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama3-rope", "mlx"),
        ("llama3-rope", "gguf"),
        ("llama3-rope", "onnx"),
        ("mistral-window", "mlx"),
        ("mistral-window", "gguf"),
        ("qwen3-tied", "mlx"),
        ("qwen3-tied", "gguf"),
        ("phi3", "mlx"),
        ("phi3", "onnx"),
    ],
)
async def test_the_result_gives_the_sources_text_and_has_its_tokenizer(
    tmp_path: Path, sources: Callable[[str], Path], name: str, target: str
) -> None:
    source = await asyncio.to_thread(sources, name)
    given = prompts(source)
    wanted = await asyncio.to_thread(greedy_tokens, source, given, _TOKENS)
    made = await asyncio.to_thread(step, source, f"safetensors-{target}", "f32", tmp_path / "made")
    if target == "gguf":
        found = await gguf_answers(made / "made.gguf", given)
        assert is_same_until_an_end(found, wanted)
        info = gguf_info(made / "made.gguf")
    else:
        start = mlx_greedy(made) if target == "mlx" else onnx_greedy(made)
        assert answers(start, given) == wanted
        is_mlx = target == "mlx"
        info = mlx_info(made / "model.safetensors") if is_mlx else onnx_info(made / "model.onnx")
        kept = sidecar_files(source)
        assert {Path(path) for path in SIDECARS} <= set(kept)
        for path, original in kept.items():
            assert (made / path).read_bytes() == original.read_bytes(), path
    # These runtimes attend to all tokens, so the context ends where the window does.
    assert info.context_length == (_WINDOW if name == "mistral-window" else 512)
    assert info.chat_template == SIDECARS["chat_template.jinja"]


def test_gguf_has_what_the_folders_files_say(
    tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    source = sources("llama3-rope")
    path = step(source, "safetensors-gguf", "f16", tmp_path / "made") / "made.gguf"
    header, tokenizer = read_gguf(path), HfTokenizer(source)
    named = SIDECARS["additional_chat_templates/tool_use.jinja"]
    assert header.text("tokenizer.chat_template.tool_use") == named
    assert header.text("general.license") == "mit"
    sampling = recommended_sampling(gguf_info(path))
    assert (sampling.temperature, sampling.top_k) == (0.5, 20)
    with gguf_vocabulary(path) as vocabulary:
        assert set(vocabulary.end_ids()) >= tokenizer.end_ids
    # And back again: the settings survive both ways.
    back = step(path, "gguf-safetensors", "f32", tmp_path / "back")
    again = HfTokenizer(back)
    assert again.end_ids == tokenizer.end_ids
    template = (back / "additional_chat_templates" / "tool_use.jinja").read_text()
    assert template == named
    generation = json.loads((back / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"]) == (0.5, 20)
    scaling = json.loads((back / "config.json").read_text())["rope_parameters"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == LLAMA3["factor"]
    assert scaling["original_max_position_embeddings"] == LLAMA3["original_max_position_embeddings"]


async def test_links_of_a_cache_are_converted_as_the_files_are(
    tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    source = await asyncio.to_thread(sources, "qwen3-tied")
    snapshot = tmp_path / "models--a--tiny" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in source.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(path.read_bytes())
        link.symlink_to(blobs / str(number))
    (tmp_path / "out").mkdir()
    made = await convert(
        ConversionRequest(info_of(snapshot), "safetensors", tmp_path / "out" / "made")
    )
    assert not any(path.is_symlink() for path in made.rglob("*"))
    for name in ("config.json", "tokenizer.json", *SIDECARS):
        assert (made / name).read_bytes() == (source / name).read_bytes()


async def test_a_source_that_changes_meanwhile_is_told(
    tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    source = await asyncio.to_thread(sources, "qwen3-tied")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"

    def truncate(_progress: object) -> None:
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)

    (tmp_path / "out").mkdir()
    request = ConversionRequest(info_of(copy), "mlx", tmp_path / "out" / "made")
    with pytest.raises(Unavailable, match=r"model\.safetensors changed during the conversion"):
        await convert(request, truncate)
    assert list((tmp_path / "out").iterdir()) == []


async def test_what_cannot_be_converted_is_refused_before_it_starts(
    tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    source = await asyncio.to_thread(sources, "phi3")
    seen: list[object] = []
    for target, quantization in (("gguf", "q8_0"), ("coreml", "mixed"), ("onnx", "int4")):
        wanted = ConversionRequest(
            info_of(source), target, tmp_path / "made", quantization=quantization
        )
        with pytest.raises(UnsupportedCapability):
            await convert(wanted, seen.append)
    assert seen == []


@pytest.mark.parametrize(("target", "quantization"), [("mlx", "4bit"), ("mlx", "original")])
async def test_memory_is_at_most_twice_the_file(
    tmp_path: Path, target: str, quantization: str
) -> None:
    # All weights in 32 bits would be 5.7 times the file.
    info = gguf_info(starter_path())
    made = await convert(
        ConversionRequest(info, target, tmp_path / "made", quantization=quantization)
    )
    peak = json.loads((made / "provenance.json").read_text())["peak_memory_bytes"]
    assert 50 * MIB < peak <= 2 * info.size_bytes + _LIBRARIES_BYTES


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
async def test_gguf_models_give_the_same_text_in_other_formats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    if kind == "llama":
        # SentencePiece, and the rotary factors of Llama 3.
        llama_gguf(path, change=add_rotary_factors)
    else:
        qwen2_gguf(path, vocabulary_size=1000)
    given = [[40, 50, 60], list(range(30, 60))]
    wanted = await gguf_answers(path, given)
    folder = await asyncio.to_thread(step, path, "gguf-safetensors", "f32", tmp_path / "hf")
    assert is_same_until_an_end(wanted, answers(torch_greedy(folder), given))
    mlx = await asyncio.to_thread(step, path, "gguf-mlx", "original", tmp_path / "mlx")
    assert is_same_until_an_end(wanted, answers(mlx_greedy(mlx), given))


def add_rotary_factors(weights: dict[str, Any]) -> None:
    scaling = LLAMA3 | {"original_max_position_embeddings": 1024}
    weights["rope_freqs.weight"] = llama3_factors(scaling, 10_000.0, 16)
