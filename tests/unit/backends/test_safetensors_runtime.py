"""The runtime of safetensors folders: what the scan's check records, and that a load follows it."""

import json
from pathlib import Path
from typing import Any

import pytest

from backends import safetensors
from backends.base import EngineOptions, ModelInfo, RuntimeChoice
from backends.hf.fit import TensorShape
from backends.runtime_check import CheckedRuntime, Excluded
from core.errors import BackendUnavailable
from tests.unit.backends.test_safetensors_backend import CONFIG, Mlx, backend_with, write

TENSORS = {
    "model.embed_tokens.weight": ("F32", [32, 8], 1024),
    "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [2], 8),
    "h.0.attn.bias": ("F32", [1, 1, 4, 4], 64),
    "h.0.attn.masked_bias": ("F32", [], 4),
    "h.0.attn.c_attn.bias": ("F32", [8], 32),
}
PYTORCH = RuntimeChoice("pytorch", "mlx-lm ignores its window", "mlx", "mlx-lm ignores its window")


@pytest.fixture
def info(tmp_path: Path) -> ModelInfo:
    (tmp_path / "tokenizer.json").write_text("{}")
    return described(tmp_path, {})


def described(folder: Path, changes: dict[str, Any]) -> ModelInfo:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return backend_with(Mlx()).identify(write(folder / "model.safetensors", TENSORS))


def checked_as(
    monkeypatch: pytest.MonkeyPatch, info: ModelInfo, found: CheckedRuntime, *avoid: str
) -> tuple[ModelInfo, list[Any]]:
    """Return the info after a check with this result, and what the check was asked."""
    asked: list[Any] = []

    def check(
        _: Any, tensors: Any, excluded: Excluded, on_runtime: Any, *, dense: Any
    ) -> CheckedRuntime:
        assert dense == tensors
        asked.extend((tensors, excluded))
        on_runtime("mlx")
        return found

    monkeypatch.setattr(safetensors, "check_runtimes", check)
    used: list[str] = []
    result = backend_with(Mlx()).check_runtimes(info, avoid, used.append)
    assert used == ["mlx"]
    return result, asked


def test_rotary_tables_and_masks_are_no_parameters(info: ModelInfo) -> None:
    assert info.parameters == 32 * 8 + 8


def test_the_check_gets_every_tensor_and_what_is_excluded(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, (tensors, excluded) = checked_as(monkeypatch, info, CheckedRuntime(PYTORCH, 77), "mlx")
    assert tensors["model.embed_tokens.weight"] == TensorShape("F32", (32, 8))
    assert "ended the process" in excluded.mlx
    assert excluded.pytorch == ""
    assert (result.choice, result.parameters) == (PYTORCH, 77)


def test_an_unknown_count_of_parameters_leaves_that_of_the_header(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = checked_as(monkeypatch, info, CheckedRuntime(PYTORCH))
    assert result.parameters == info.parameters


def test_a_load_on_mlx_gets_no_more_context_than_mlx_is_right_for(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = checked_as(monkeypatch, info, CheckedRuntime(PYTORCH, 0, 16))
    backend = backend_with(Mlx())
    assert result.context_length == 64
    assert backend.estimate(result, EngineOptions()).context_tokens == 64
    assert backend.estimate(result, EngineOptions(runtime="mlx")).context_tokens == 16
    assert backend.estimate(result, EngineOptions(runtime="pytorch")).context_tokens == 64
    mlx = RuntimeChoice("mlx", "PyTorch is not installed")
    result, _ = checked_as(monkeypatch, info, CheckedRuntime(mlx, 0, 16))
    assert result.context_length == 16


def test_a_load_on_pytorch_gets_the_context_before_its_rotary_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}
    info = described(tmp_path, {"rope_scaling": scaling})
    mlx = RuntimeChoice("mlx", "it fits", "pytorch", "MLX is preferred")
    result, _ = checked_as(monkeypatch, info, CheckedRuntime(mlx))
    backend = backend_with(Mlx())
    assert result.context_length == 64
    assert backend.estimate(result, EngineOptions()).context_tokens == 64
    assert backend.estimate(result, EngineOptions(runtime="pytorch")).context_tokens == 32


def test_a_load_follows_the_setting_and_else_the_scan(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(safetensors, "open_torch", lambda *_: opened.append("pytorch"))
    monkeypatch.setattr(Mlx, "open", lambda *_: opened.append("mlx"))
    result, _ = checked_as(monkeypatch, info, CheckedRuntime(PYTORCH))
    for runtime in (None, "mlx", "pytorch"):
        backend_with(Mlx()).open(result, EngineOptions(runtime=runtime))
    assert opened == ["pytorch", "mlx", "pytorch"]
    only = RuntimeChoice("pytorch", "mlx-lm lacks a bias")
    result, _ = checked_as(monkeypatch, info, CheckedRuntime(only))
    backend_with(Mlx()).open(result, EngineOptions(runtime="mlx"))
    assert opened[-1] == "pytorch"
    with pytest.raises(BackendUnavailable):
        backend_with(None).open(info, EngineOptions(runtime="mlx"))
