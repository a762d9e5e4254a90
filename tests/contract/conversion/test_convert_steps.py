"""Requests that conversions refuse, and steps that fail, on models of a few bytes."""

import asyncio
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import ModelInfo
from catalog.convert.child import run_step
from catalog.convert.job import Job, link_source, read_json, with_legacy_rope_keys
from catalog.convert.run import ConversionProgress, ConversionRequest, convert
from catalog.convert.steps.gguf_tokenizer import PATTERNS, patterns_for, pre_name, pre_tokenizer
from catalog.convert.steps.rotary import llama3_factors
from catalog.convert.steps.to_onnx import make_loadable, name_class
from core.errors import (
    BrokenModel,
    ModelFileMissing,
    RequestError,
    Unavailable,
    UnsupportedCapability,
)
from core.types import Capability

CONFIG = {"model_type": "llama", "tie_word_embeddings": True, "auto_map": {"AutoModel": "evil.py"}}


def info_of(folder: Path, format: str, weights: str) -> ModelInfo:
    files = [folder / weights, *sorted(path for path in folder.iterdir() if path.name != weights)]
    return ModelInfo(
        format=format,
        name="tiny",
        architecture="llama",
        quantization="f32",
        files=tuple(files),
        size_bytes=100,
        parameters=10,
        context_length=64,
        capabilities=frozenset({Capability.COMPLETION}),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder without weights yet."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Where conversions write."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def save(path: Path, value: Any) -> None:
    import torch

    torch.save(value, path)


async def test_a_wrapped_checkpoint_becomes_safetensors(source: Path, models: Path) -> None:
    import torch
    from safetensors.numpy import load_file

    shared = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tensors = {
        "module.a.weight": shared,
        "_orig_mod.module.embed_tokens.weight": shared,
        "lm_head.weight": shared,
    }
    save(source / "model.pt", {"epoch": 3, "state_dict": tensors})
    seen: list[ConversionProgress] = []
    request = ConversionRequest(
        info_of(source, "pytorch", "model.pt"), "safetensors", models / "made", quantization="f16"
    )
    made = await convert(request, seen.append)
    assert made == models / "made"
    loaded = load_file(made / "model.safetensors")
    assert loaded.keys() == {"a.weight", "embed_tokens.weight"}
    assert loaded["a.weight"].dtype == np.float16
    assert loaded["a.weight"].tolist() == shared.tolist()
    config = json.loads((made / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "auto_map" not in config
    names = {path.name for path in made.iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "provenance.json"}
    assert [path.name for path in models.iterdir()] == ["made"]
    assert seen[-1] == ConversionProgress(1.0, 1, 1, "done")


class Evil:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self._mark,)


async def test_a_pickle_with_code_is_refused_and_not_run(source: Path, models: Path) -> None:
    mark = models.with_name("ran")
    save(source / "model.pt", {"weight": Evil(mark)})
    info = info_of(source, "pytorch", "model.pt")
    with pytest.raises(BrokenModel, match=r"refused.*pathlib"):
        await convert(ConversionRequest(info, "safetensors", models / "made"))
    assert not mark.exists()
    assert list(models.iterdir()) == []


@pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}])
async def test_a_checkpoint_without_tensors_is_refused(
    source: Path, models: Path, value: Any
) -> None:
    save(source / "model.pt", value)
    info = info_of(source, "pytorch", "model.pt")
    with pytest.raises(BrokenModel, match="does not contain"):
        await convert(ConversionRequest(info, "safetensors", models / "made"))
    assert list(models.iterdir()) == []


async def test_a_compressed_archive_is_refused(source: Path, models: Path) -> None:
    with zipfile.ZipFile(source / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 100_000)
    info = info_of(source, "pytorch", "model.pt")
    with pytest.raises(BrokenModel, match="compressed"):
        await convert(ConversionRequest(info, "safetensors", models / "made"))


@pytest.mark.parametrize("data", [b"", b'\x08\0\0\0\0\0\0\0{"a":1}!', b"\xff" * 64])
async def test_damaged_safetensors_are_refused(source: Path, models: Path, data: bytes) -> None:
    (source / "model.safetensors").write_bytes(data)
    info = info_of(source, "safetensors", "model.safetensors")
    with pytest.raises(BrokenModel):
        await convert(ConversionRequest(info, "safetensors", models / "made"))
    assert list(models.iterdir()) == []


async def test_wrong_requests_are_refused_before_anything_runs(source: Path, models: Path) -> None:
    (source / "model.safetensors").write_bytes(b"x")
    info = info_of(source, "safetensors", "model.safetensors")
    good = ConversionRequest(info, "safetensors", models / "made")
    (models / "taken").mkdir()
    wrong = {
        "target": replace(good, target=models / "taken"),
        "group_size": replace(good, group_size=48),
        "exporter": replace(good, exporter="magic"),
        "context_tokens": replace(good, context_tokens=0),
        "threads": replace(good, threads=0),
        "model": replace(good, source=replace(info, files=())),
        "quantization": replace(good, quantization="q9"),
        "target_format": replace(good, target_format="zip"),
    }
    for param, request in wrong.items():
        with pytest.raises(RequestError) as caught:
            await convert(request)
        assert caught.value.param == param
    with pytest.raises(RequestError, match="not a valid folder name"):
        await convert(replace(good, target=models / ".hidden"))
    with pytest.raises(ModelFileMissing):
        await convert(replace(good, source=replace(info, files=(source / "gone",))))
    assert [path.name for path in models.iterdir()] == ["taken"]


async def test_two_conversions_to_one_name_cannot_both_win(source: Path, models: Path) -> None:
    import torch

    save(source / "model.pt", {"weight": torch.ones(2, 2)})
    request = ConversionRequest(
        info_of(source, "pytorch", "model.pt"), "safetensors", models / "made"
    )
    results = await asyncio.gather(convert(request), convert(request), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["PosixPath", "RequestError"]
    assert [path.name for path in models.iterdir()] == ["made"]


def job(files: tuple[Path, ...], work: Path) -> Job:
    return Job("safetensors", "mlx", files, work / "out", work, "tiny", "f32")


def test_staging_shows_the_models_files_alone(source: Path, tmp_path: Path) -> None:
    (source / "unrelated.json").write_text("{}")
    listed = (source / "config.json", source / "evil.py", source / "tokenizer.json")
    work = tmp_path / "work"
    work.mkdir()
    folder = link_source(job(listed, work))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert "auto_map" not in read_json(folder / "config.json")


def test_a_job_survives_the_pipe(tmp_path: Path) -> None:
    before = job((tmp_path / "a b.safetensors",), tmp_path)
    assert Job.from_json(before.to_json()) == before


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_damaged_json_is_a_broken_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BrokenModel):
        read_json(tmp_path / "config.json")
    with pytest.raises(BrokenModel, match="missing"):
        read_json(tmp_path / "other.json")


def test_rope_parameters_are_lifted_for_older_readers() -> None:
    plain = with_legacy_rope_keys({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert plain["rope_theta"] == 5e5
    assert "rope_scaling" not in plain
    scaled = with_legacy_rope_keys(
        {"rope_parameters": {"rope_theta": 1.0, "rope_type": "linear", "factor": 2}}
    )
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2}
    nested = with_legacy_rope_keys({
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        }
    })  # fmt: skip
    assert (nested["rope_theta"], nested["rope_local_base_freq"]) == (1e6, 1e4)
    assert (
        with_legacy_rope_keys({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 9.0}})[
            "rope_theta"
        ]
        == 7
    )
    assert with_legacy_rope_keys({"vocab_size": 3}) == {"vocab_size": 3}


def test_llama_3_stretches_long_wavelengths_only() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(scaling, 5e5, 128)
    assert factors.shape == (64,)
    assert (factors[0], factors[-1]) == (1.0, 8.0)
    assert (np.diff(factors) >= 0).all()
    assert ((factors > 1.0) & (factors < 8.0)).any()


@pytest.mark.parametrize("name", PATTERNS)
def test_pre_tokenizers_are_recognised_as_what_they_were_made_from(name: str) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(PATTERNS[name])
    assert pre_name(json.loads(tokenizer.to_str())["pre_tokenizer"]) == name
    assert patterns_for(name) == PATTERNS[name]


def test_hugging_faces_own_spelling_of_smollm_is_recognised() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "use_regex": True}
    assert pre_name({"type": "Sequence", "pretokenizers": [digits, byte_level]}) == "smollm"
    assert pre_name(byte_level) == "gpt-2"
    with pytest.raises(UnsupportedCapability, match="no known equivalent"):
        pre_name({"type": "Whitespace"})
    assert patterns_for("never-heard-of") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_disk_that_fills_up_half_way_is_told(source: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(512, 1024)}, source / "model.safetensors")
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    (work / "out" / "model.safetensors").symlink_to("/dev/full")
    files = (source / "model.safetensors", source / "config.json")
    started = Job("safetensors", "safetensors", files, work / "out", work, "tiny", "f16")
    with pytest.raises(Unavailable, match="disk is full"):
        run_step(started, lambda _fraction, _doing: None)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
async def test_weights_that_half_precision_cannot_hold_are_refused(
    source: Path, models: Path, value: float
) -> None:
    import torch
    from safetensors.torch import save_file

    weights = torch.ones(4, 4)
    weights[2, 1] = value
    save_file({"some.weight": weights}, source / "model.safetensors")
    info = info_of(source, "safetensors", "model.safetensors")
    request = ConversionRequest(info, "safetensors", models / "made", quantization="f16")
    with pytest.raises((BrokenModel, RequestError), match=r"'some\.weight'"):
        await convert(request)
    assert list(models.iterdir()) == []


def test_a_tokenizer_that_transformers_cannot_load_does_not_stop_the_builder(
    source: Path,
) -> None:
    from transformers import AutoTokenizer

    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text('{"model": {"type": "Made-up"}}')
    (source / "merges.txt").write_text("x")
    make_loadable(source)
    assert AutoTokenizer.from_pretrained(source, local_files_only=True).vocab_size == 1
    assert not (source / "merges.txt").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen2"}, ["Qwen2ForCausalLM"]),
        ({"model_type": "qwen2", "architectures": ["Other"]}, ["Other"]),
        ({"model_type": "never-heard-of"}, None),
    ],
)
def test_the_builder_is_told_the_class_of_a_model(
    source: Path, config: dict[str, Any], expected: list[str] | None
) -> None:
    (source / "config.json").write_text(json.dumps(config))
    name_class(source)
    assert read_json(source / "config.json").get("architectures") == expected
