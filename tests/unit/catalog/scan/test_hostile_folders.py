"""Group M over the readers of folders: hostile names, descriptions and links are bounded."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from catalog.names import bare_name
from catalog.scan.packages import Packages, is_part, model_stem
from catalog.scan.walk import MAX_FILES, is_partial, walk
from tests.gguf_raw import minimal_gguf
from tests.unit.catalog.scan.folders import Shelf, write_json, write_model, write_weights

NESTED = '{"a":' * 100_000


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def text(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(content)

    return write


DESCRIPTIONS = (
    "config.json", "model_index.json", "adapter_config.json", "preprocessor_config.json",
    "tokenizer_config.json", "generation_config.json", "modules.json",
    "model.safetensors.index.json", "chat_template.jinja", "README.md", "provenance.json",
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "sentence_bert_config.json",
    "config_sentence_transformers.json", "special_tokens_map.json", "genai_config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
@pytest.mark.parametrize(
    "make",
    [pipe, loop, device, folder, text(NESTED), text("\0"), text("[]"), text('"x"'), text("")],
)
def test_a_hostile_description_neither_hangs_nor_hides_other_models(
    shelf: Shelf, name: str, make: Callable[[Path], None]
) -> None:
    minimal_gguf(shelf.models / "good.gguf")
    path = write_model(shelf.models / "bad") / name
    path.unlink(missing_ok=True)
    make(path)
    shelf.scan()
    assert shelf.states()["good@gguf-f32"] == "ok"
    # The folder has weights: they are listed or refused, never passed over.
    assert len(shelf.states()) == 2
    shelf.scan()
    assert shelf.looked == []


@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
@pytest.mark.parametrize(
    "content",
    [
        {"_class_name": ["x"] * 10_000},
        {"_class_name": {"a": 1}},
        {"architectures": ["A" * 1_000_000]},
        {"architectures": {"ForCTC": 1}, "model_type": 7},
        {"model_type": ["vit"], "wrapper_model_type": {"clip": 1}},
        {"model_type": "\n\x1b[31mvit"},
    ],
)
def test_a_lying_description_is_refused(shelf: Shelf, name: str, content: object) -> None:
    write_weights(shelf.models / "bad" / "model.safetensors")
    write_json(shelf.models / "bad" / name, content)
    shelf.scan()
    assert shelf.states() == {"bad@safetensors": "refused"}
    reason = shelf.reason("bad@safetensors")
    assert len(reason) < 1000
    assert reason.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "encoder" + "_a" * 110 + ".onn",
        "model" + "-int8" * 40 + "!",
        "a" + "-00001-of-0000" * 15,
        "x" * 200 + ".onnx_data_",
        "config" * 40 + ".jso",
        "0" * 250,
        "..." * 80,
        "-" * 250,
        "checkpoint-" * 20,
    ],
)
def test_hostile_names_take_no_time(shelf: Shelf, name: str) -> None:
    path = shelf.models / name
    for _ in range(100):
        bare_name(path.parts, name)
        is_part(path)
        is_partial(name)
        model_stem(path)
    (shelf.models / name).write_bytes(b"x")
    shelf.scan()


def test_a_description_above_the_model_folder_counts_for_nothing(shelf: Shelf) -> None:
    write_json(shelf.home / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_model(shelf.models / "tiny")
    write_weights(shelf.models / "other" / "x.safetensors")
    packages = Packages()
    path = shelf.models / "other" / "x.safetensors"
    assert packages.of(path, shelf.models) == path
    shelf.scan()
    assert shelf.states()["tiny@safetensors-f32"] == "ok"


def test_a_folder_named_as_a_package_is_bounded(shelf: Shelf) -> None:
    inner = shelf.models / "a.mlpackage" / "b.mlpackage" / "c.mlmodelc"
    inner.mkdir(parents=True)
    for number in range(50):
        (inner / f"{number}.bin").write_bytes(b"PK\x03\x04")
        (inner / f"{number}.safetensors").write_bytes(b"x")
    shelf.scan()
    assert list(shelf.states().values()) == ["refused"]


def test_ten_thousand_files_end_a_walk(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 5):
        (tmp_path / f"{number}").touch()
    found = walk([tmp_path])
    assert len(found.candidates) == MAX_FILES
    assert any(f"only the first {MAX_FILES:,}" in line for line in found.skipped)
