"""A model runs on Apple's GPU only if it computes there what it computes on the CPU."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from backends.base import EngineOptions, ModelInfo  # noqa: E402
from backends.pytorch import placement  # noqa: E402
from backends.pytorch.placement import compare_with_cpu, limitations, place  # noqa: E402
from backends.trials import RamTrials, TrialOptions, TrialResult  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class Gpu:
    """Stands in for a GPU: notes where a model is moved, and can compute otherwise there."""

    def __init__(self, model: Any, spoil: Any = lambda values: values) -> None:
        self.moves: list[str] = []
        self.passes: list[str] = []
        self._forward, self._spoil = model.forward, spoil
        model.to = self._move
        model.forward = self._compute

    def _move(self, name: str) -> None:
        self.moves.append(name)

    def _compute(self, input_ids: Any, **options: Any) -> Any:
        on_gpu = bool(self.moves) and self.moves[-1] == "mps"
        self.passes.append("mps" if on_gpu else "cpu")
        found = self._forward(input_ids=input_ids, **options)
        return found if not on_gpu else self._spoiled(found)

    def _spoiled(self, found: Any) -> Any:
        for name in ("logits", "last_hidden_state"):
            if name in found:
                found[name] = self._spoil(found[name])
        if found.get("hidden_states") is not None:
            found["hidden_states"] = tuple(self._spoil(each) for each in found.hidden_states)
        return found


def build(kind: str, dtype: Any = None, **changes: Any) -> Any:
    torch.manual_seed(5)
    if kind == "decoder":
        config = transformers.LlamaConfig(**SIZES, **changes)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(**SIZES, **changes)
        name = {"embedder": "BertModel", "reranker": "BertForSequenceClassification"}[kind]
        model = getattr(transformers, name)(config)
    return model.to(dtype or torch.float32).eval()


KINDS = [("decoder", {}), ("embedder", {}), ("reranker", {"num_labels": 1})]


@pytest.mark.parametrize(("kind", "changes"), KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_is_no_difference(kind: str, changes: dict[str, Any], dtype: str) -> None:
    model = build(kind, getattr(torch, dtype), **changes)
    Gpu(model, lambda values: values * (1 + 1e-3))
    assert compare_with_cpu(model, "mps") == TrialResult()


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_a_model_that_is_silently_wrong_is_found(kind: str, changes: dict[str, Any]) -> None:
    model = build(kind, **changes)
    # Right for the first token, as attention is whose mask leaks.
    Gpu(model, lambda values: torch.cat([values[:, :1], values[:, 1:].flip(-1)], 1))
    found = compare_with_cpu(model, "mps")
    assert not found.is_sound
    assert found.reason.startswith("on Apple's GPU its results differ from the CPU's by ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found(value: float) -> None:
    model = build("decoder")
    Gpu(model, lambda values: values * value)
    assert not compare_with_cpu(model, "mps").is_sound


def test_a_difference_that_only_one_text_has_is_chance() -> None:
    model = build("decoder")
    calls: list[int] = []

    def once(values: Any) -> Any:
        calls.append(1)
        return values.flip(-1) if len(calls) == 1 else values

    Gpu(model, once)
    assert compare_with_cpu(model, "mps").is_sound


def test_an_operator_that_the_gpu_lacks_is_found_and_one_the_cpu_lacks_is_not() -> None:
    def fail(_: Any) -> Any:
        raise NotImplementedError("aten::new is not implemented for the MPS device")

    model = build("decoder")
    Gpu(model, fail)
    found = compare_with_cpu(model, "mps")
    assert not found.is_sound
    assert "fails (aten::new is not implemented" in found.reason
    model = build("decoder")
    gpu = Gpu(model)
    gpu._forward = fail
    assert compare_with_cpu(model, "mps") == TrialResult()


def info_of(path: Path) -> ModelInfo:
    path.write_bytes(b"weights")
    return ModelInfo("pytorch", "tiny", "llama", "f32", (path,), 7, 1000, 64, frozenset())


@pytest.mark.parametrize("is_right", [True, False])
def test_the_result_is_kept_and_decides_the_device(
    is_right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def hold() -> AbstractContextManager[None]:
        held.append(1)
        return nullcontext()

    freed: list[int] = []
    monkeypatch.setattr(placement, "device", lambda: "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: freed.append(1))
    trial = TrialOptions(RamTrials(), hold)
    info = info_of(tmp_path / "model.bin")
    for is_first in (True, False):
        gpu = Gpu(model := build("decoder"), lambda v: v if is_right else v.flip(-1))
        result = place(model, info, trial)
        assert result.is_sound == is_right
        assert gpu.moves[-1] == ("mps" if is_right else "cpu")
        assert gpu.passes == (["cpu", "cpu", "mps", "mps"] if is_first else [])
    # Else the weights would be held twice.
    assert freed == ([] if is_right else [1, 1])
    # Only the passes on the GPU take the turn of this process.
    assert held == [1]
    (note,) = limitations("tiny", result) or ("",)
    assert note.startswith("" if is_right else "tiny runs on the CPU, which is slower: on Apple's")


def test_without_a_gpu_nothing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "device", lambda: "cpu")
    gpu = Gpu(model := build("decoder"))
    assert place(model, info_of(tmp_path / "model.bin"), TrialOptions(RamTrials())) == TrialResult()
    assert (gpu.moves, gpu.passes) == ([], [])
    assert limitations("tiny", TrialResult()) == ()


async def test_a_model_that_the_gpu_computes_wrongly_is_served_by_the_cpu_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends.pytorch.loading import open_torch
    from backends.registry import backends_for
    from tests.encoder_models import tokenizer

    torch.manual_seed(5)
    folder = tmp_path / "tiny"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    torch.save(build("decoder").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    info = backends_for(["pytorch"])["pytorch"].identify(folder / "pytorch_model.bin")
    moves: list[str] = []

    def move(model: Any, name: str) -> Any:
        moves.append(name)
        return model

    monkeypatch.setattr(placement, "device", lambda: "mps")
    monkeypatch.setattr(torch.nn.Module, "to", move)
    wrong = TrialResult(False, reason="on Apple's GPU its results differ from the CPU's by 40%")
    monkeypatch.setattr(placement, "compare_with_cpu", lambda *_: wrong)
    engine = open_torch(info, EngineOptions(threads=1, trial=TrialOptions(RamTrials())))
    try:
        assert moves == ["cpu"]
        assert any("runs on the CPU" in note for note in engine.limitations)
    finally:
        await engine.close()
