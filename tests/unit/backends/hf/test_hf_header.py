"""Tests of reading safetensors headers and JSON: true ones, and damaged or hostile ones."""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.hf.header import (
    DTYPE_BITS,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    TensorEntry,
    count_bytes,
    read_json,
    safetensors_header,
)
from core.errors import BrokenModel, NotThisFormat


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    as_list = [list(value) if isinstance(value, tuple) else value for value in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.zeros((5,), np.float16)}
    save_file(arrays, path, metadata={"format": "pt"})
    header = safetensors_header(path)
    assert dict(header.tensors) == {
        "a.weight": TensorEntry("F32", (3, 4), 48),
        "b": TensorEntry("F16", (5,), 10),
    }
    assert header.tensors["a.weight"].elements == 12
    assert dict(header.metadata) == {"format": "pt"}
    assert dict(count_bytes(header.tensors.values())) == {"F32": 48, "F16": 10}


def test_scalars_empty_tensors_and_padded_headers_are_fine(tmp_path: Path) -> None:
    header = {"empty": tensor(shape=(0, 7), offsets=(0, 0)), "one": tensor("I64", (), (0, 8))}
    text = json.dumps(header).encode() + b"   "
    read = safetensors_header(write(tmp_path / "m.safetensors", text, bytes(8)))
    assert read.tensors["empty"].elements == 0
    assert read.tensors["one"].elements == 1


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_its_size(tmp_path: Path, dtype: str) -> None:
    count = DTYPE_BITS[dtype]
    header = {"x": tensor(dtype, (8,), (0, count))}
    entry = safetensors_header(write(tmp_path / "m.safetensors", header, bytes(count))).tensors["x"]
    assert entry == TensorEntry(dtype, (8,), count)


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"x": tensor("F128")}, bytes(8), "unknown dtype 'F128'"),
        ({"x": tensor(["F32"])}, bytes(8), "unknown dtype"),
        ({"x": tensor(shape="two")}, bytes(8), "invalid shape"),
        ({"x": tensor(shape=(-2,))}, bytes(8), "invalid shape"),
        ({"x": tensor(shape=(True, 2))}, bytes(8), "invalid shape"),
        ({"x": tensor(shape=(1,) * 17)}, bytes(8), "invalid shape"),
        ({"x": tensor(offsets=(8, 0))}, bytes(8), "invalid offsets"),
        ({"x": tensor(offsets=(0, 4, 8))}, bytes(8), "invalid offsets"),
        ({"x": tensor(offsets=(0, 8.0))}, bytes(8), "invalid offsets"),
        ({"x": tensor(shape=(3,))}, bytes(8), "does not match its shape and dtype"),
        ({"x": tensor(shape=(2**62, 2**62))}, bytes(8), "does not match its shape and dtype"),
        ({"x": "F32"}, bytes(8), "is not an object"),
        ({"x": tensor(), "y": tensor(offsets=(4, 12))}, bytes(12), "overlap at byte 4"),
        ({"x": tensor(), "y": tensor(offsets=(12, 20))}, bytes(20), "gap between them at byte 8"),
        ({"x": tensor()}, bytes(5), "ends 3 bytes before"),
        ({"x": tensor()}, bytes(11), "3 bytes after its last tensor"),
        ({"__metadata__": ["x"], "x": tensor()}, bytes(8), "__metadata__ is not an object"),
        ({"__metadata__": {"format": 1}, "x": tensor()}, bytes(8), "object with string values"),
        (b'{"x": ', b"", "not valid JSON"),
        (b'{"x": "\xff"}', b"", "not UTF-8"),
        (b'{"x":' + b"[" * 100_000, b"", "nested too deeply"),
        (b'{"x":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    ],
)
def test_damaged_headers_are_refused(
    tmp_path: Path, header: Any, data: bytes, problem: str
) -> None:
    with pytest.raises(BrokenModel, match=problem):
        safetensors_header(write(tmp_path / "model.safetensors", header, data))


def test_a_length_beyond_the_file_or_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(BrokenModel, match="over the limit"):
        safetensors_header(path)
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")
    with pytest.raises(BrokenModel, match="inside its header"):
        safetensors_header(path)


def test_an_oversized_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**40) + b"{")
        file.truncate(2**41)
    with pytest.raises(BrokenModel, match="over the limit"):
        safetensors_header(path)


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"no safetensors at all", bytes(64)])
def test_other_content_is_refused_by_name_and_else_not_ours(tmp_path: Path, content: bytes) -> None:
    named, other = tmp_path / "model.safetensors", tmp_path / "model.bin"
    named.write_bytes(content)
    other.write_bytes(content)
    with pytest.raises(BrokenModel):
        safetensors_header(named)
    with pytest.raises(NotThisFormat):
        safetensors_header(other)


def test_an_lfs_pointer_says_that_it_was_not_downloaded(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(BrokenModel, match="not downloaded"):
        safetensors_header(path)


def test_pipes_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder", "missing"):
        with pytest.raises(BrokenModel):
            safetensors_header(tmp_path / f"{name}.safetensors")


def test_no_damage_raises_anything_else(tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    header = {f"layers.{i}": tensor(offsets=(8 * i, 8 * i + 8)) for i in range(6)}
    path = write(tmp_path / "model.safetensors", header, bytes(48))
    good = path.read_bytes()
    generator = random.Random(7)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(generator.choice((1, 1, 3))):
            data[generator.randrange(len(data) - 48)] = generator.randrange(256)
        path.write_bytes(data[: generator.choice((len(data), generator.randrange(len(data))))])
        try:
            safetensors_header(path)
        except BrokenModel:
            refused += 1
            continue
        # What we accept the library opens too.
        try:
            with safe_open(path, "np") as opened:
                opened.keys()
        except SafetensorError as error:
            pytest.fail(f"accepted, but the library refuses it: {error}: {path.read_bytes()!r}")
    assert refused > 200


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[1, 2]", "not an object"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xfe"}', "not UTF-8"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not downloaded"),
        (b" " * (MAX_CONFIG_BYTES + 1), "over the limit"),
    ],
)
def test_damaged_json_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(BrokenModel, match=problem):
        read_json(path)


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "other.json")
