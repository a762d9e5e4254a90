"""Hostile and half-finished model folders: refused with the reason by a child that lives on."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.base import ModelInfo
from backends.registry import load_backends
from catalog.scan.identify import Outcome, Refused, Unknown
from catalog.scan.inspector import Inspector
from tests import onnx_files
from tests.gguf_files import llama_gguf
from tests.golden import golden

CONFIG = {
    **onnx_files.CONFIG,
    "hidden_size": 32,
    "num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    """One child for all files: one that dies of a file fails the test after it."""
    inspector = Inspector(list(load_backends()))
    yield inspector
    inspector.close()


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self._command,)


def folder_with_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    onnx_files.write_tokenizer(folder)
    return folder


def sound_folder(folder: Path) -> Path:
    """A copy of the starter as safetensors."""
    shutil.copytree(golden("hf-f32"), folder)
    return folder


def refusal(outcome: Outcome) -> str:
    assert isinstance(outcome, Refused), outcome
    assert "inspection died" not in outcome.reason
    return outcome.reason


def test_m1_a_damaged_gguf_is_refused(tmp_path: Path, inspector: Inspector) -> None:
    path = llama_gguf(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    data[8:16] = (2**62).to_bytes(8, "little")
    path.write_bytes(data)
    assert "tensors" in refusal(inspector.examine(path))


def test_m2_a_safetensors_header_over_the_file_is_refused(
    tmp_path: Path, inspector: Inspector
) -> None:
    path = folder_with_config(tmp_path) / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert path.name in refusal(inspector.examine(path))


def test_m2_an_index_that_leaves_the_folder_is_refused(
    tmp_path: Path, inspector: Inspector
) -> None:
    folder = sound_folder(tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" in refusal(inspector.examine(folder / "model.safetensors"))


@pytest.mark.parametrize("protocol", range(6))
def test_m3_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, inspector: Inspector, protocol: int
) -> None:
    canary = tmp_path / "canary"
    path = folder_with_config(tmp_path) / "pytorch_model.bin"
    data = pickle.dumps({"weight": Shell(f"touch {canary}")}, protocol)
    if protocol < 2:
        path.write_bytes(data)
        assert not isinstance(inspector.examine(path), ModelInfo)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3")
        assert "posix.system" in refusal(inspector.examine(path))
    assert not canary.exists()


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin"])
def test_m4_external_data_outside_the_folder_is_refused(
    tmp_path: Path, inspector: Inspector, location: str
) -> None:
    import onnx

    folder = tmp_path / "model"
    folder.mkdir()
    path = onnx_files.write_folder(folder, onnx_files.encoder(), config=onnx_files.ENCODER_CONFIG)
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    path.write_bytes(model.SerializeToString())
    (tmp_path / "secret.bin").write_bytes(bytes(2**16))
    assert "folder" in refusal(inspector.examine(path))


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "missing/model.mlmodel"])
def test_m5_a_package_that_names_what_is_not_in_it_is_refused(
    tmp_path: Path, inspector: Inspector, path: str
) -> None:
    package = tmp_path / "tiny.mlpackage"
    (package / "Data").mkdir(parents=True)
    manifest = {
        "itemInfoEntries": {"a": {"path": path, "name": "model.mlmodel"}},
        "rootModelIdentifier": "a",
    }
    (package / "Manifest.json").write_text(json.dumps(manifest))
    assert refusal(inspector.examine(package / "Manifest.json"))


def test_m5_deep_nesting_is_refused(tmp_path: Path, inspector: Inspector) -> None:
    package = tmp_path / "tiny.mlpackage"
    package.mkdir()
    (package / "Manifest.json").write_text("[" * 200_000)
    assert not isinstance(inspector.examine(package / "Manifest.json"), ModelInfo)


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?<"}, "behavior": "Isolated"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a", "aa b"]}},
        {"model": 7},
    ],
    ids=["pattern", "merges", "type"],
)
def test_m6_a_broken_tokenizer_is_refused(
    tmp_path: Path, inspector: Inspector, change: dict[str, Any]
) -> None:
    folder = sound_folder(tmp_path / "model")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert "tokenizer.json" in refusal(inspector.examine(folder / "model.safetensors"))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"model_file": "modeling.py"},
    ],
    ids=["auto_map", "model_file"],
)
def test_m7_code_of_a_model_is_not_run(
    tmp_path: Path, inspector: Inspector, change: dict[str, Any]
) -> None:
    folder = sound_folder(tmp_path / "model")
    canary = tmp_path / "canary"
    (folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\n")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert refusal(inspector.examine(folder / "model.safetensors"))
    assert not canary.exists()


def test_m9_a_wrong_extension_changes_nothing(tmp_path: Path, inspector: Inspector) -> None:
    path = llama_gguf(tmp_path / "model.gguf").rename(tmp_path / "model.onnx")
    outcome = inspector.examine(path)
    assert isinstance(outcome, ModelInfo)
    assert outcome.format == "gguf"
    pickled = tmp_path / "model.safetensors"
    pickled.write_bytes(pickle.dumps({"a": Shell("true")}))
    assert not isinstance(inspector.examine(pickled), ModelInfo)


@pytest.mark.parametrize(
    ("missing", "said"),
    [("tokenizer.json", "tokenizer"), ("model-00002-of-00002.safetensors", "model-00002-of")],
)
def test_a_folder_that_is_nearly_a_model_names_what_is_missing(
    tmp_path: Path, inspector: Inspector, missing: str, said: str
) -> None:
    folder = sound_folder(tmp_path / "model")
    weights = folder / "model.safetensors"
    if missing.startswith("model-"):
        first = folder / "model-00001-of-00002.safetensors"
        weights = weights.rename(first)
        index = {"weight_map": {"a": first.name, "b": missing}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (folder / missing).unlink()
    assert said in refusal(inspector.examine(weights))


def test_weights_without_a_config_are_no_model(tmp_path: Path, inspector: Inspector) -> None:
    folder = sound_folder(tmp_path / "model")
    (folder / "config.json").unlink()
    outcome = inspector.examine(folder / "model.safetensors")
    reasons = outcome.reasons if isinstance(outcome, Unknown) else (refusal(outcome),)
    assert any("config.json" in reason for reason in reasons)
