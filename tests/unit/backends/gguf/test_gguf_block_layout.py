"""The layout of a GGUF model's blocks: it differs where their bytes would."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from backends.base import EngineOptions
from backends.gguf.blocks import block_layout
from backends.gguf.model import GgufModel

pytest.importorskip("llama_cpp")
OPTIONS: dict[str, Any] = {"context_tokens": 1024, "kv_tokens": 8192}


@dataclass
class FakeModel:
    whole_beyond: int = 1 << 30
    values: dict[str, str] = field(default_factory=dict)

    def metadata(self, key: str) -> str:
        return self.values.get(key, "")


def layout(model: FakeModel | None = None, **options: Any) -> str | None:
    chosen: Any = model or FakeModel()
    real: GgufModel = chosen
    return block_layout(real, EngineOptions(**{**OPTIONS, **options}))


def test_each_kv_type_has_a_layout_of_its_own() -> None:
    # Flash attention is what separates the default from an explicit f16.
    types = (None, "f16", "f32", "bf16", "q8_0", "q4_0")
    assert len({layout(kv_type=kv_type) for kv_type in types}) == len(types)


def test_the_number_of_cells_matters_only_where_the_rotation_depends_on_it() -> None:
    assert layout(kv_tokens=2048) == layout(kv_tokens=16_384)
    name = "phi3.rope.scaling.original_context_length"
    model = FakeModel(values={"general.architecture": "phi3", name: "4096"})
    assert layout(model, kv_tokens=2048) == layout(model, kv_tokens=4096)
    assert layout(model, kv_tokens=4096) != layout(model, kv_tokens=4352)


def test_what_does_not_change_the_bytes_does_not_change_the_layout() -> None:
    assert layout() == layout(max_sequences=3, threads=4, prefill_chunk_tokens=64, prefix_bytes=9)


@pytest.mark.parametrize(("whole_beyond", "is_stored"), [(0, False), (1000, False), (1024, True)])
def test_cells_that_cannot_be_split_are_not_stored(whole_beyond: int, is_stored: bool) -> None:
    assert (layout(FakeModel(whole_beyond)) is not None) == is_stored
