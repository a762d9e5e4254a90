"""Reading npz headers, whole and damaged."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.mlx.npz import NpzEntry, read_npz
from core.errors import BrokenModel, NotThisFormat


def write(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def array_file(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def test_names_types_shapes_and_sizes(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.ones((2, 3), np.float32), b=np.ones(5, np.uint32))
    assert read_npz(path) == {"a": NpzEntry("F32", (2, 3), 24), "b": NpzEntry("U32", (5,), 20)}


def test_bfloat16_as_mlx_writes_it(tmp_path: Path) -> None:
    text = b"{'descr': '<V2', 'fortran_order': False, 'shape': (2, 3, )}".ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12)
    path = write(tmp_path / "w.npz", {"a.npy": data})
    assert read_npz(path) == {"a": NpzEntry("BF16", (2, 3), 12)}


@pytest.mark.parametrize("data", [b"", b"GGUF", b"\x00" * 100])
def test_other_files_are_another_format(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.npz"
    path.write_bytes(data)
    with pytest.raises(NotThisFormat):
        read_npz(path)


def test_other_archives_are_another_format(tmp_path: Path) -> None:
    with pytest.raises(NotThisFormat):
        read_npz(write(tmp_path / "w.npz", {"readme.txt": b"hello"}))
    with pytest.raises(NotThisFormat):
        read_npz(tmp_path / "missing.npz")


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    data = array_file(np.array([{"a": 1}], dtype=object))
    with pytest.raises(BrokenModel, match="objects"):
        read_npz(write(tmp_path / "w.npz", {"a.npy": data}))


def test_compressed_arrays_are_refused(tmp_path: Path) -> None:
    data = array_file(np.zeros(100_000, np.float32))
    with pytest.raises(BrokenModel, match="compressed"):
        read_npz(write(tmp_path / "w.npz", {"a.npy": data}, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("change", [-4, 4])
def test_data_that_does_not_fill_its_shape_is_refused(tmp_path: Path, change: int) -> None:
    data = array_file(np.zeros(16, np.float32))
    data = data[:change] if change < 0 else data + bytes(change)
    with pytest.raises(BrokenModel, match="shape"):
        read_npz(write(tmp_path / "w.npz", {"a.npy": data}))


def test_a_file_without_its_end_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, a=np.ones(100, np.float32))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BrokenModel, match="end"):
        read_npz(path)


def test_a_directory_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w.npz", {"a.npy": array_file(np.ones(4, np.float32))})
    data = bytearray(path.read_bytes())
    data[-10:-6] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(BrokenModel, match="directory"):
        read_npz(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 900), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(tmp_path: Path, place: int, value: int) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, a=np.ones((4, 4), np.float32), b=np.ones(9, np.float16))
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    try:
        found = read_npz(path)
    except (BrokenModel, NotThisFormat):
        return
    assert sum(entry.nbytes for entry in found.values()) <= len(data)
