"""A conversion's measured quality: none lost, little lost, everything lost, and not a number."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from backends.registry import load_backends
from catalog.convert.pause import PauseSwitch
from catalog.convert.quality.figure import QualityFigure
from catalog.convert.quality.measure import QualityLimits, measure_quality
from catalog.convert.run import ConversionRequest, convert
from core.errors import BrokenModel
from tests.encoder_models import ENCODERS, save_encoder
from tests.gguf_files import llama_gguf
from tests.tiny_folders import write_model

pytestmark = pytest.mark.timeout(600)

SHORT = QualityLimits(tokens=128, seconds=120)
FEW = QualityLimits(tokens=32, seconds=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers, whose vocabulary is bytes and a few words."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny", "Llama", hidden_size=128)


def info_of(folder: Path, format: str = "safetensors") -> Any:
    return load_backends()[format].identify(folder / "model.safetensors")


async def figure_of(
    source: Path, result: Path, format: str, limits: QualityLimits = SHORT
) -> QualityFigure:
    work = result.parent / f"{result.name}-work"
    work.mkdir()
    figure = await measure_quality(info_of(source), result, format, work, limits=limits)
    assert list(work.iterdir()) == []
    return figure


async def converted(source: Path, target: Path, format: str, quantization: str) -> Path:
    request = ConversionRequest(info_of(source), format, target, quantization, group_size=32)
    return await convert(request)


def changed(source: Path, target: Path, change: Callable[[str, Any], Any]) -> Path:
    """Copy a folder; `change` gets each tensor's name and values."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    made = {name: np.ascontiguousarray(change(name, values)) for name, values in tensors.items()}
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    return target


async def test_the_same_model_does_not_differ(source: Path, tmp_path: Path) -> None:
    same = changed(source, tmp_path / "same", lambda _, values: values)
    figure = await figure_of(source, same, "safetensors")
    assert figure.reason == ""
    assert figure.tokens == 128
    assert figure.kl_mean == pytest.approx(0, abs=1e-6)
    assert figure.kl_p99 == pytest.approx(0, abs=1e-6)
    assert figure.same_top_share == 1.0
    assert figure.perplexity_result == pytest.approx(figure.perplexity_source, rel=1e-6)


@pytest.mark.parametrize(
    ("format", "exact", "coarse"), [("mlx", "f32", "4bit"), ("gguf", "f32", "q4_0")]
)
async def test_fewer_bits_differ_more_and_destroyed_weights_most(
    source: Path, tmp_path: Path, format: str, exact: str, coarse: str
) -> None:
    whole = await figure_of(
        source, await converted(source, tmp_path / exact, format, exact), format
    )
    small = await figure_of(
        source, await converted(source, tmp_path / coarse, format, coarse), format
    )
    random = np.random.default_rng(1)
    shuffled = changed(source, tmp_path / "shuffled", lambda _, values: random.permuted(values))
    lost = await figure_of(
        source, await converted(shuffled, tmp_path / "lost", format, exact), format
    )
    for figure in (whole, small, lost):
        assert figure.reason == ""
        assert figure.tokens == 128
    means = [figure.kl_mean or 0.0 for figure in (whole, small, lost)]
    assert means[0] < 1e-3 < means[1] < 0.5 < 5 * means[1] < means[2], means
    assert (
        (whole.same_top_share or 0)
        > 0.95
        > (small.same_top_share or 0)
        > (lost.same_top_share or 0)
    )
    assert whole.perplexity_source == small.perplexity_source == lost.perplexity_source
    assert whole.perplexity_result == pytest.approx(whole.perplexity_source, rel=0.01)


@pytest.mark.parametrize(
    ("format", "quantization", "divergence"),
    [("onnx", "f32", 1e-3), ("onnx", "int8", 0.1), ("coreml", "f32", 1e-3)],
)
async def test_results_of_other_formats_are_measured(
    source: Path, tmp_path: Path, format: str, quantization: str, divergence: float
) -> None:
    made = await converted(source, tmp_path / "made", format, quantization)
    figure = await figure_of(source, made, format, FEW)
    assert (figure.tokens, figure.reason) == (32, "")
    assert 0 <= (figure.kl_mean or 0) < divergence
    assert figure.perplexity_result == pytest.approx(figure.perplexity_source, rel=0.1)


@pytest.mark.parametrize("format", ["gguf", "mlx", "safetensors"])
async def test_sources_of_other_formats_are_measured(tmp_path: Path, format: str) -> None:
    file = llama_gguf(tmp_path / "tiny-F32.gguf")
    info = load_backends()["gguf"].identify(file)
    quantization = "q8_0" if format == "gguf" else "f32"
    made = await convert(ConversionRequest(info, format, tmp_path / "made", quantization))
    figure = await measure_quality(info, made, format, tmp_path, limits=FEW)
    assert (figure.tokens, figure.reason) == (32, "")
    assert 0 <= (figure.kl_mean or 0) < 0.01
    assert (figure.same_top_share or 0) > 0.8


async def test_not_a_number_is_a_failed_conversion(source: Path, tmp_path: Path) -> None:
    broken = changed(
        source, tmp_path / "nan", lambda name, values: values * (np.nan if "norm" in name else 1)
    )
    with pytest.raises(BrokenModel, match=r"safetensors gave a model that cannot be used: .*NaN"):
        await figure_of(source, broken, "safetensors")


async def test_a_source_that_cannot_run_leaves_the_perplexity(source: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    same = changed(source, tmp_path / "same", lambda _, values: values)
    work = tmp_path / "work"
    work.mkdir()
    other = replace(info_of(source), format="unheard-of")
    figure = await measure_quality(other, same, "safetensors", work, limits=SHORT)
    assert figure.reason == "The source was not run: no installed format is named unheard-of."
    assert not figure.is_measured
    assert (figure.perplexity_result or 0) > 1
    assert figure.perplexity_source is None


async def test_memory_and_time_are_bounded(source: Path, tmp_path: Path) -> None:
    same = changed(source, tmp_path / "same", lambda _, values: values)
    little = QualityLimits(tokens=128, memory_bytes=1000)
    figure = await figure_of(source, same, "safetensors", little)
    assert not figure.is_measured
    assert "The result was not run" in figure.reason
    assert "1000 B" in figure.reason
    short = await measure_quality(
        info_of(source), same, "safetensors", tmp_path, limits=QualityLimits(seconds=0.01)
    )
    assert not short.is_measured
    assert "time was over" in short.reason


async def test_embeddings_are_compared(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder", ENCODERS["bert"])
    same = changed(source, tmp_path / "same", lambda _, values: values)
    figure = await figure_of(source, same, "safetensors")
    assert (figure.tokens, figure.reason) == (16, "")
    assert figure.cosine_mean == pytest.approx(1, abs=1e-6)
    random = np.random.default_rng(1)
    lost = changed(source, tmp_path / "lost", lambda _, values: random.permuted(values))
    other = await figure_of(source, lost, "safetensors")
    assert (other.cosine_mean or 0) < 0.9
    assert other.kl_mean is None


async def test_cancelling_ends_the_child_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    pause, others = PauseSwitch(), set(psutil.Process().children())
    task = asyncio.create_task(
        measure_quality(info_of(source), source, "safetensors", tmp_path, pause=pause)
    )
    while not (children := set(psutil.Process().children()) - others):
        await asyncio.sleep(0.01)
    pause.switch(is_on=True)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(child.is_running() for child in children)
    assert list(tmp_path.iterdir()) == []
