"""Tests of pooling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.embedding.folder import EmbeddingSettings, read_settings
from backends.embedding.pooling import MODES, Pooling, pool
from core.errors import BrokenModel

HIDDEN = np.array([[[1, 2], [3, -4], [5, 6]], [[2, 0], [9, 9], [9, 9]]], np.float32)
MASK = np.array([[1, 1, 1], [1, 0, 0]])


def write_folder(folder: Path, *kinds: str, pooling: Any = None, **bert: Any) -> Path:
    """Write a sentence-transformers folder's files."""
    modules = [
        {"idx": i, "path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if bert:
        (folder / "sentence_bert_config.json").write_text(json.dumps(bert))
    return folder


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("cls", [1, 2], [2, 0]),
        ("last", [5, 6], [2, 0]),
        ("max", [5, 6], [2, 0]),
        ("mean", [3, 4 / 3], [2, 0]),
        ("mean_sqrt_len", [9 / 3**0.5, 4 / 3**0.5], [2, 0]),
        # (1·x₁ + 2·x₂ + 3·x₃) / (1 + 2 + 3)
        ("weighted_mean", [22 / 6, 12 / 6], [2, 0]),
        ("cls+mean", [1, 2, 3, 4 / 3], [2, 0, 2, 0]),
    ],
)
def test_padding_does_not_count(mode: str, first: list[float], second: list[float]) -> None:
    vectors = pool(HIDDEN, MASK, Pooling(mode, normalize=False))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [first, second], rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_padding_may_be_on_the_left_and_hold_anything(mode: str) -> None:
    hidden = HIDDEN[:, ::-1].copy()
    hidden[1, :2] = np.nan
    vectors = pool(hidden, MASK[:, ::-1], Pooling(mode, normalize=False))
    assert vectors[1].tolist() == [2, 0]


@pytest.mark.parametrize("mode", MODES)
def test_vectors_are_unit_vectors_where_the_model_wants_it(mode: str) -> None:
    vectors = pool(HIDDEN.astype(np.float16), MASK, Pooling(mode, normalize=True))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_row_without_tokens_is_zero(mode: str) -> None:
    vectors = pool(HIDDEN, np.zeros_like(MASK), Pooling(mode))
    assert not vectors.any()


def test_folder_without_modules_means_mean_and_unit_vectors(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == EmbeddingSettings(Pooling("mean", True))


def test_modules_say_what_is_done(tmp_path: Path) -> None:
    config = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    write_folder(tmp_path, "Transformer", "Pooling", pooling=config, max_seq_length=256)
    assert read_settings(tmp_path) == EmbeddingSettings(Pooling("cls", False), max_tokens=256)
    write_folder(tmp_path, "Transformer", "Pooling", "Normalize")
    assert read_settings(tmp_path) == EmbeddingSettings(Pooling("cls", True), max_tokens=256)


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls+mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean", "max"]}, "mean+max"),
    ],
)
def test_both_forms_of_the_config_are_read(
    tmp_path: Path, config: dict[str, Any], mode: str
) -> None:
    write_folder(tmp_path, "Transformer", "Pooling", pooling=config)
    assert read_settings(tmp_path).pooling.mode == mode


@pytest.mark.parametrize(
    "config",
    [[], {"pooling_mode": "magic"}, {"pooling_mode": []}, {"pooling_mode": 3}],
)
def test_damaged_pooling_is_refused(tmp_path: Path, config: Any) -> None:
    write_folder(tmp_path, "Transformer", "Pooling", pooling=config)
    with pytest.raises(BrokenModel):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "modules",
    [
        "{}",
        "[3]",
        '[{"type": 3}]',
        '[{"type": "a.Pooling", "path": "../x"}]',
        '[{"type": "a.Pooling", "path": "/etc"}]',
        "[" * 100_000,
        "not json",
        " " * (1024 * 1024 + 1),
    ],
)
def test_damaged_modules_are_refused(tmp_path: Path, modules: str) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(BrokenModel):
        read_settings(tmp_path)


def test_module_that_is_not_known_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "Transformer", "Pooling", "LSTM", pooling={})
    with pytest.raises(BrokenModel, match="LSTM"):
        read_settings(tmp_path)


@pytest.mark.parametrize("length", [0, "256", True, 1.5])
def test_length_that_is_no_count_is_refused(tmp_path: Path, length: Any) -> None:
    write_folder(tmp_path, "Transformer", max_seq_length=length)
    with pytest.raises(BrokenModel, match="max_seq_length"):
        read_settings(tmp_path)
