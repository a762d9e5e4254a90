"""Weights written piece by piece are what the safetensors library reads."""

import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from backends.hf.header import safetensors_header
from catalog.convert import tensor_file
from catalog.convert.tensor_file import LazyTensor, rows_at_once, write_tensors
from core.errors import BrokenModel

DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I64": np.int64}


def lazy(name: str, dtype: str, values: NDArray[Any], rows: int = 1) -> LazyTensor:
    def pieces() -> Iterable[NDArray[Any]]:
        if not values.shape:
            return [values]
        return (values[start : start + rows] for start in range(0, len(values), rows))

    return LazyTensor(name, dtype, values.shape, pieces)


def arrays() -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(1)
    return {
        "odd.bytes": random.integers(0, 255, 7, np.uint8),
        "a.weight": random.standard_normal((5, 3), np.float32),
        "half": random.standard_normal((4, 3)).astype(np.float16),
        "count": np.array(7, np.int64),
        "umlaut.ä": random.standard_normal((2, 2, 2), np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def tensors() -> list[LazyTensor]:
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    return [lazy(name, names[values.dtype], values) for name, values in arrays().items()]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    seen: list[float] = []
    write_tensors(tmp_path, tensors(), metadata={"format": "pt"}, on_progress=seen.append)
    path = tmp_path / "model.safetensors"
    loaded = load_file(path)
    assert loaded.keys() == arrays().keys()
    for name, values in arrays().items():
        assert loaded[name].dtype == values.dtype
        assert loaded[name].tolist() == values.tolist()
    assert safetensors_header(path).metadata == {"format": "pt"}
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors(), metadata={}, on_progress=lambda _: None)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % np.dtype(DTYPES[entry["dtype"]]).itemsize == 0


def test_large_models_get_shards_and_an_index(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors(), metadata={}, on_progress=lambda _: None, shard_bytes=64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    loaded = {key: value for name in files for key, value in load_file(tmp_path / name).items()}
    assert {name: values.tolist() for name, values in loaded.items()} == {
        name: values.tolist() for name, values in arrays().items()
    }
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in arrays().values())


@pytest.mark.parametrize("rows", [1, 3])
def test_a_tensor_with_other_values_than_its_shape_says_is_refused(
    tmp_path: Path, rows: int
) -> None:
    values = np.zeros((rows, 2), np.float32)
    wrong = LazyTensor("w", "F32", (2, 2), lambda: [values])
    with pytest.raises(BrokenModel, match="does not have the values"):
        write_tensors(tmp_path, [wrong], metadata={}, on_progress=lambda _: None)


@pytest.mark.parametrize(("names", "problem"), [((), "any tensors"), (("w", "w"), "twice")])
def test_no_tensors_and_repeated_ones_are_refused(
    tmp_path: Path, names: tuple[str, ...], problem: str
) -> None:
    listed = [lazy(name, "F32", np.zeros((1, 1), np.float32)) for name in names]
    with pytest.raises(BrokenModel, match=problem):
        write_tensors(tmp_path, listed, metadata={}, on_progress=lambda _: None)


def test_a_tensor_is_computed_when_it_is_written_and_not_kept(tmp_path: Path) -> None:
    made: list[weakref.ref[NDArray[Any]]] = []

    def pieces() -> Iterable[NDArray[Any]]:
        for _ in range(4):
            # The one that was written last, until the next one takes its place.
            assert sum(each() is not None for each in made) <= 1
            piece = np.zeros((1, 8), np.float32)
            made.append(weakref.ref(piece))
            yield piece
            del piece

    listed = [LazyTensor(f"w{index}", "F32", (4, 8), pieces) for index in range(3)]
    assert made == []
    write_tensors(tmp_path, listed, metadata={}, on_progress=lambda _: None)
    assert len(made) == 12


def test_pieces_have_a_bounded_size() -> None:
    assert rows_at_once((1 << 20, 1 << 10)) * (1 << 10) == tensor_file.PIECE_ELEMENTS
    assert rows_at_once((4, 1 << 30)) == 1
    assert rows_at_once((4,)) > 4
    assert rows_at_once((4, 0)) >= 1
