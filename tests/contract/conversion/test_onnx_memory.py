"""Exports to ONNX hold pieces of the weights, and write what the builder alone would write."""

import io
import json
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from backends.base import ModelInfo
from backends.onnx.info import onnx_info
from catalog.convert import memory
from catalog.convert.memory import needed_bytes
from catalog.convert.run import ConversionRequest, convert
from catalog.convert.steps.onnx_builder import run_builder
from catalog.convert.support import ONNX_BUILT
from core.types import Capability
from core.units import MIB
from tests.tiny_folders import LLAMA3, write_model

pytestmark = pytest.mark.timeout(300)

_TIED = {"tie_word_embeddings": True}
# Widths that are no whole blocks; the classes of `ONNX_BUILT`.
_BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "hidden_size": 80, "num_attention_heads": 5,
                        "num_key_value_heads": 5, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"intermediate_size": 144}),
    "qwen2": ("Qwen2", _TIED),
    "qwen3": ("Qwen3", {"head_dim": 32, **_TIED}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "granite": ("Granite", {"tie_word_embeddings": False}),
    "ernie4_5": ("Ernie4_5", {}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 16}),
}  # fmt: skip
_PRECISIONS = ("int4", "int8", "fp32")
# What libraries take, of an export of a tiny model.
_LIBRARIES_BYTES = 480 * MIB
_LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "large layers": ("Llama", {
        "hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 12,
        "num_key_value_heads": 12, "tie_word_embeddings": False,
    }),
    "a large vocabulary": ("Qwen3", {
        "vocab_size": 120_000, "hidden_size": 512, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "a traced model": ("Phi3", {
        "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 3072,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def in_bf16(folder: Path) -> Path:
    """Store a model's weights in bfloat16."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    halved = {name: each.to(torch.bfloat16) for name, each in load_file(path).items()}
    save_file(halved, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def built(source: Path, precision: str, output: Path, *, is_streamed: bool) -> dict[str, bytes]:
    """Return the files of a model that the builder writes."""
    options = ("-e", "cpu", "-c", str(output / "cache"), "--extra_options", "hf_remote=false")
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        run_builder(
            ["-i", str(source), "-o", str(output), "-p", precision, *options],
            is_streamed=is_streamed,
        )
    return {name: (output / name).read_bytes() for name in ("model.onnx", "model.onnx.data")}


def test_all_architectures_of_the_builder_are_compared() -> None:
    assert set(_BUILT) == ONNX_BUILT


@pytest.mark.parametrize("name", _BUILT)
@pytest.mark.parametrize("is_16_bit", [False, True])
def test_what_is_written_is_what_the_builder_itself_writes(
    tmp_path: Path, name: str, is_16_bit: bool
) -> None:
    class_name, settings = _BUILT[name]
    source = write_model(tmp_path / "model", class_name, **settings)
    if is_16_bit:
        in_bf16(source)
    for precision in _PRECISIONS:
        made = built(source, precision, tmp_path / precision, is_streamed=True)
        wanted = built(source, precision, tmp_path / f"{precision}-own", is_streamed=False)
        assert made == wanted, precision


def info_of(folder: Path) -> ModelInfo:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    return ModelInfo(
        format="safetensors",
        name="large",
        architecture=config["model_type"],
        quantization="bf16",
        files=(weights, *sorted(folder.glob("*.json"))),
        size_bytes=weights.stat().st_size,
        parameters=weights.stat().st_size // 2,
        context_length=512,
        capabilities=frozenset({Capability.COMPLETION}),
        details={
            "n_embd": config["hidden_size"],
            "vocabulary_size": config["vocab_size"],
            "n_layer": config["num_hidden_layers"],
        },
    )


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("large layers", "int4"),
        ("a large vocabulary", "int4"),
        ("a large vocabulary", "f32"),
        ("large layers", "int8"),
        ("a traced model", "f32"),
    ],
)
async def test_private_memory_is_what_was_foreseen_and_at_most_twice_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, quantization: str
) -> None:
    monkeypatch.setattr(memory, "_WATCH_INTERVAL_S", 0.02)
    class_name, settings = _LARGE[name]
    info = info_of(in_bf16(write_model(tmp_path / "model", class_name, **settings)))
    assert info.size_bytes > 100 * MIB
    needed = needed_bytes(info, ("safetensors", "onnx"))
    # All weights once in f32 would be more.
    assert needed < _LIBRARIES_BYTES + 4 * info.parameters
    seen = [0]
    made = await convert(
        ConversionRequest(info, "onnx", tmp_path / "made", quantization=quantization),
        on_memory=seen.append,
    )
    assert 50 * MIB < max(seen) <= needed
    assert max(seen) <= 2 * info.size_bytes + _LIBRARIES_BYTES
    # Nothing of the work is left, and the result is one that a scan takes.
    assert {path.name for path in tmp_path.iterdir()} == {"model", "made"}
    assert onnx_info(made / "model.onnx").architecture == info.architecture
