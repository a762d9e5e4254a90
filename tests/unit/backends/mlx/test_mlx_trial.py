"""Trials of tiny models on mlx-lm: what its batches and caches compute wrongly is found."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

from backends.base import EngineOptions, ModelInfo
from backends.engine.trial.checks import TrialTerms, run_trial
from backends.mlx.model import import_runtime
from backends.mlx.stepper import MlxStepper
from backends.mlx.trial import MlxSubject, try_model
from backends.trials import (
    OtherRuntimeNeeded,
    RamTrials,
    TrialOptions,
    TrialResult,
)

VOCABULARY, WINDOW = 40, 16
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
}


def tiny(model_type: str, **changes: Any) -> Any:
    """Return what `MlxSubject` uses of a model with random weights."""
    import_runtime(1)
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import _get_classes

    config = {**SIZES, "model_type": model_type, **changes}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    mx.random.seed(3)
    # Larger weights than those of training's start: attention must matter.
    model.update(tree_map(lambda each: mx.random.normal(each.shape) * 0.4, model.parameters()))
    return SimpleNamespace(model=model, vocabulary_size=VOCABULARY, close=lambda: None)


TERMS = TrialTerms(0.01, windows=(WINDOW,))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma3_text", {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    ],
)
def test_a_right_architecture_passes(model_type: str, changes: dict[str, Any]) -> None:
    assert run_trial(MlxSubject(tiny(model_type, **changes)), TERMS) == TrialResult()


def test_an_architecture_whose_masks_know_no_batch_is_found() -> None:
    result = run_trial(MlxSubject(tiny("gemma2")), TERMS)
    assert not result.has_batches
    assert result.is_sound
    assert result.has_cache
    assert result.has_chunks
    assert result.has_reuse


def test_a_window_that_is_ignored_is_found_against_the_right_numbers() -> None:
    right = MlxSubject(
        tiny("llama", sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
    )
    ignorant = MlxSubject(tiny("llama"))
    assert run_trial(ignorant, TrialTerms(0.01), right.alone).is_right
    result = run_trial(ignorant, TERMS, right.alone)
    assert not result.is_sound
    assert result.has_batches


def info_of(path: Path) -> ModelInfo:
    file = path / "model.safetensors"
    file.write_bytes(b"weights")
    return ModelInfo("safetensors", "tiny", "llama", "f32", (file,), 7, 10_000, 512, frozenset())


def test_a_wrong_model_is_given_to_the_other_runtime_and_not_loaded_again(
    tmp_path: Path,
) -> None:
    info, store, loaded = info_of(tmp_path), RamTrials(), []

    def load() -> Any:
        loaded.append(tiny("llama"))
        return loaded[-1]

    class Refused(MlxSubject):
        """Another runtime, which computes something else."""

    other = Refused(tiny("llama", rope_theta=3.0))
    from contextlib import nullcontext

    trial = TrialOptions(store, has_alternative=True, reference=lambda: nullcontext(other.alone))
    options = EngineOptions(trial=trial)
    for _ in range(2):
        with pytest.raises(OtherRuntimeNeeded, match="differ"):
            try_model(info, {}, load, options, is_dense=False)
    assert len(loaded) == 1


def test_without_another_runtime_a_model_is_served_and_the_user_is_told(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    options = EngineOptions(trial=TrialOptions(RamTrials()), kv_tokens=512, context_tokens=512)
    model, result = try_model(info, {}, lambda: tiny("gemma2"), options, is_dense=False)
    assert not result.has_batches
    model.cache_shapes = model.cache_dtypes = ()
    stepper = MlxStepper(model, None, options, result)  # type: ignore[arg-type]
    assert stepper.max_sequences == 1
