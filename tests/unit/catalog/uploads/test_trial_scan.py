"""A scan of one folder without a catalog: what is usable, and why the rest is not."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from backends.base import Backend
from backends.registry import backends_for
from catalog.scan.identify import Outcome, Uninspected, examine
from catalog.uploads.trial import try_scan
from core.errors import BrokenModel, Unavailable
from tests.gguf_files import llama_gguf
from tests.unit.catalog.scan.folders import write_model

BACKENDS: Sequence[Backend] = tuple(backends_for(["gguf", "safetensors", "pytorch"]).values())


def look(path: Path) -> Outcome:
    return examine(path, BACKENDS)


def test_new_files_are_judged_at_once(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "good-Q8_0.gguf")
    write_model(tmp_path / "nice")
    assert [model.info.name for model in try_scan(tmp_path, BACKENDS, look)] == ["good", "nice"]


def test_folder_with_a_damaged_model_alone_is_refused_with_the_reason(tmp_path: Path) -> None:
    whole = llama_gguf(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[:200])
    with pytest.raises(BrokenModel, match="ends inside its header"):
        try_scan(tmp_path, BACKENDS, look)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BrokenModel, match=r"no model of a format .*gguf, safetensors, pytorch"):
        try_scan(tmp_path, BACKENDS, look)


def test_inspection_that_failed_says_nothing_of_the_model(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "a.gguf")
    with pytest.raises(Unavailable, match="no memory"):
        try_scan(tmp_path, BACKENDS, lambda _: Uninspected("no memory"))
