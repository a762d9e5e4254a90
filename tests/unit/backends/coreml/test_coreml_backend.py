"""The Core ML backend on tiny packages: encoders, padded decoders, what is refused."""

import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import EngineOptions
from backends.coreml.backend import CoremlBackend
from backends.coreml.layout import read_layout
from backends.coreml.rows import CoremlRows
from backends.coreml.runtime import open_runtime
from backends.coreml.spec import read_spec
from backends.coreml.system import needed_release
from backends.engine.row_model import RowInput
from core.errors import BackendUnavailable, BrokenModel, NotThisFormat
from core.types import Capability

ct = pytest.importorskip("coremltools")
pytest.importorskip("torch")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "sea", "grey", "cat", "town"]
TABLE = np.random.default_rng(7).normal(size=(len(WORDS), 6)).astype(np.float32)
LENGTH = 8


def write_folder(folder: Path, kind: str) -> None:
    """Write a configuration and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "BertModel":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "bert" if kind == "BertModel" else "llama",
        "architectures": [kind],
        "hidden_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 12,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")


def write_model(folder: Path, kind: str, output: str) -> Path:
    """Write a package that looks token vectors up, zeros where the mask is zero."""
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    specs = [mb.TensorSpec(shape=(1, LENGTH), dtype=types.int32) for _ in range(2)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(input_ids: Any, attention_mask: Any) -> Any:
        hidden = mb.gather(x=TABLE, indices=input_ids, axis=0)
        shown = mb.cast(x=mb.expand_dims(x=attention_mask, axes=[2]), dtype="fp32")
        hidden = mb.mul(x=hidden, y=shown)
        if output == "logits":
            return mb.matmul(x=hidden, y=TABLE, transpose_y=True, name="logits")
        return mb.identity(x=hidden, name=output)

    write_folder(folder, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(folder / "tiny.mlpackage"))
    return folder / "tiny.mlpackage" / "Manifest.json"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of an encoder."""
    return write_model(tmp_path_factory.mktemp("encoder"), "BertModel", "last_hidden_state")


def write_stateful_model(folder: Path) -> Path:
    """Write a package that has the state and the inputs of a language model."""
    import torch

    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keyCache", torch.zeros(1, 1, 16, 6))
            self.register_buffer("table", torch.tensor(TABLE))

        def forward(self, inputIds: Any, causalMask: Any) -> Any:
            self.keyCache.add_(1.0)
            logits = self.table[inputIds.long()] @ self.table.T
            return logits + self.keyCache.mean() + causalMask.mean()

    write_folder(folder, "LlamaForCausalLM")
    count, total = ct.RangeDim(1, 16, default=1), ct.RangeDim(1, 16, default=1)
    cache = ct.TensorType(shape=(1, 1, 16, 6), dtype=np.float16)
    example = (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            torch.jit.trace(Model().eval(), example, check_trace=False),
            inputs=[
                ct.TensorType(shape=(1, count), dtype=np.int32, name="inputIds"),
                ct.TensorType(shape=(1, 1, count, total), dtype=np.float16, name="causalMask"),
            ],
            outputs=[ct.TensorType(name="logits")],
            states=[ct.StateType(wrapped_type=cache, name="keyCache")],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        model.save(str(folder / "stateful.mlpackage"))
    return folder / "stateful.mlpackage" / "Manifest.json"


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a language model with a state."""
    return write_stateful_model(tmp_path_factory.mktemp("stateful"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a decoder without a state, of one fixed length."""
    return write_model(tmp_path_factory.mktemp("decoder"), "LlamaForCausalLM", "logits")


def test_identify_knows_an_encoder(encoder: Path) -> None:
    info = CoremlBackend().identify(encoder)
    assert info.capabilities == {Capability.EMBEDDING}
    assert (info.name, info.architecture, info.context_length) == ("tiny", "bert", LENGTH)


async def test_an_encoder_embeds_texts_of_any_length(encoder: Path) -> None:
    backend = CoremlBackend()
    engine = backend.open(backend.identify(encoder), EngineOptions())
    try:
        found = await engine.embed(["sea", "grey cat town"])
    finally:
        await engine.close()
    for vector, ids in zip(found.vectors, ([2, 4, 3], [2, 5, 6, 7, 3]), strict=True):
        mean = TABLE[ids].mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=1e-5)
    assert found.prompt_tokens == 8


def test_a_padded_decoder_reads_all_its_tokens(decoder: Path) -> None:
    info = CoremlBackend().identify(decoder)
    assert info.capabilities >= {Capability.CHAT, Capability.COMPLETION}
    assert info.details["reads_all"] is True
    spec = read_spec(decoder)
    model = CoremlRows(open_runtime(spec, 1), spec, read_layout(spec, 32), max_rows=2)
    assert model.vocabulary_size == len(WORDS)
    row, other = model.open_row(8), model.open_row(8)
    logits = model.extend([RowInput(row, [4, 5]), RowInput(other, [6])])
    np.testing.assert_allclose(logits, TABLE[[5, 6]] @ TABLE.T, rtol=1e-4, atol=1e-5)
    assert model.truncate(row, 1)
    copy = model.copy_row(row, 1, 8)
    assert copy is not None
    logits = model.extend([RowInput(copy, [7]), RowInput(row, [6, 4])])
    np.testing.assert_allclose(logits, TABLE[[7, 4]] @ TABLE.T, rtol=1e-4, atol=1e-5)
    model.close()
    model.close()


def test_identify_needs_the_tokenizer(encoder: Path, tmp_path: Path) -> None:
    package = tmp_path / "tiny.mlpackage"
    shutil.copytree(encoder.parent, package)
    with pytest.raises(BrokenModel, match=r"tokenizer\.json"):
        CoremlBackend().identify(package / "Manifest.json")
    write_folder(package, "BertModel")
    assert CoremlBackend().identify(package / "Manifest.json").context_length == LENGTH


def test_identify_refuses_a_classifier(decoder: Path, tmp_path: Path) -> None:
    shutil.copytree(decoder.parent, tmp_path / "tiny.mlpackage")
    write_folder(tmp_path, "BertModel")
    with pytest.raises(BrokenModel, match="scores texts"):
        CoremlBackend().identify(tmp_path / "tiny.mlpackage" / "Manifest.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "weight.bin", "x.onnx"])
def test_identify_leaves_other_files_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(NotThisFormat):
        CoremlBackend().identify(tmp_path / name)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS runs it with coremltools alone")
def test_availability_names_what_is_missing(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CoremlBackend()
    assert backend.availability().is_available
    info = backend.identify(encoder)
    monkeypatch.setattr("backends.coreml.backend.importlib.util.find_spec", lambda _: None)
    assert "torch" in backend.availability().reason
    with pytest.raises(BackendUnavailable, match="torch"):
        backend.open(info, EngineOptions())


@pytest.mark.parametrize(
    ("version", "has_states", "release"),
    [(0, False, 0), (1, False, 0), (8, False, 0), (9, False, 15), (10, False, 26), (11, False, 26),
     (0, True, 15), (9, True, 15), (10, True, 26)],
)  # fmt: skip
def test_a_model_needs_the_macos_of_its_specification_and_states(
    version: int, has_states: bool, release: int
) -> None:
    assert needed_release(version, has_states=has_states) == release


def test_a_stateful_model_is_refused_on_macos_14_before_core_ml_is_asked(
    stateful: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, options = CoremlBackend(), EngineOptions()
    info = backend.identify(stateful)
    assert info.details["specification"] == 9
    monkeypatch.setattr("backends.coreml.system.macos_release", lambda: 14)
    # The rest of Core ML works on macOS 14, as identifying this model does.
    assert backend.availability().is_available
    assert backend.identify(stateful) == info
    reason = r"^stateful is a Core ML model with a state for macOS 15 or later; this is macOS 14\. "
    with pytest.raises(BackendUnavailable, match=reason):
        backend.estimate(info, options)
    # One that was identified by an earlier version: its file is read again when it is opened.
    known = {key: info.details[key] for key in info.details if key != "specification"}
    with pytest.raises(BackendUnavailable, match=reason):
        backend.estimate(replace(info, details=known), options)
    known["state_elements"] = 0
    with pytest.raises(BackendUnavailable, match=reason):
        backend.open(replace(info, details=known), options)


@pytest.mark.parametrize("release", [15, 26, 0])
def test_a_stateful_model_runs_from_macos_15_on_and_elsewhere(
    release: int, stateful: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.coreml.system.macos_release", lambda: release)
    info = CoremlBackend().identify(stateful)
    assert CoremlBackend().estimate(info, EngineOptions()).kv_bytes > 0


def test_a_model_without_a_state_runs_on_macos_14_unless_its_program_is_newer(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CoremlBackend()
    info = backend.identify(encoder)
    monkeypatch.setattr("backends.coreml.system.macos_release", lambda: 14)
    with pytest.raises(BackendUnavailable, match="is a Core ML model for macOS 15 or later"):
        backend.estimate(info, EngineOptions())
    older = replace(info, details={**info.details, "specification": 8})
    assert backend.estimate(older, EngineOptions()).context_tokens == LENGTH
