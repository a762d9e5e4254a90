"""Reading pickles of tensors without running them."""

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from backends.pytorch.unpickle import ALLOWED, PickledTensor, UnsafePickle, read_pickle

OPEN = b"\x80\x02"


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def tensor_pickle(
    *,
    kind: bytes = b"torch FloatStorage",
    elements: int = 6,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
) -> bytes:
    """Return the pickle of one tensor, as torch.save writes it."""

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    name = kind.replace(b" ", b"\n")
    identity = b"(X\x07\x00\x00\x00storagec" + name + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    return (
        OPEN
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + identity
        + number(elements)
        + b"tQ"
        + number(offset)
        + numbers(shape)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


def test_a_tensor_is_described() -> None:
    value, end = read_pickle(tensor_pickle())
    assert isinstance(value, PickledTensor)
    assert (value.dtype, value.shape, value.nbytes) == ("f32", (2, 3), 24)
    assert value.storage.key == "0"
    assert end == len(tensor_pickle())


def test_plain_values_come_through_and_pickles_may_follow_each_other() -> None:
    value = {"step": 3, "name": "ü", "list": [1, (2, None)], "flags": {"a": True, "b": 2.5}}
    data = pickle.dumps(value, 2) + pickle.dumps(7, 2)
    first, end = read_pickle(data)
    assert first == value
    assert read_pickle(data, end) == (7, len(data))
    assert read_pickle(pickle.dumps(value, 4))[0] == value
    assert read_pickle(pickle.dumps(OrderedDict(a=1), 2))[0] == {"a": 1}


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_would_run_code_is_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "made"
    data = pickle.dumps({"weight": Evil(target)}, protocol)
    with pytest.raises(UnsafePickle, match="mkdir"):
        read_pickle(data)
    assert not target.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins\neval", "torch.load\nx", "torch\nload", "torch.storage\n_load_from_bytes", "a\nb c"],
)
def test_every_name_outside_the_list_is_refused(name: str) -> None:
    assert name.replace("\n", ".") not in ALLOWED
    with pytest.raises(UnsafePickle, match="imports"):
        read_pickle(OPEN + b"c" + name.encode() + b"\n.")


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (2, 4)},
        {"shape": (2**20, 2**20, 2**20), "stride": (0, 0, 0)},
        {"shape": (-1, 3)},
        {"offset": 1},
        {"offset": -1},
        {"stride": (4, 1)},
        {"stride": (3,)},
        {"shape": (1,) * 9, "stride": (1,) * 9},
        {"elements": -5},
        {"kind": b"torch Storage"},
        {"kind": b"collections OrderedDict"},
    ],
)
def test_impossible_tensors_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsafePickle):
        read_pickle(tensor_pickle(**changes))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"0.",
        b"t.",
        b"(.",
        b"R.",
        b"NNR.",
        b"NNs.",
        b"}NNNu.",
        b"}(Nu.",
        b"}()Nu.",
        b"NNa.",
        b"h\x05.",
        b"NNb.",
        b"NQ.",
        b"(X\x07\x00\x00\x00storageNNNNtQ.",
        b"ccollections\nOrderedDict\nN\x85R.",
        b"ctorch\nSize\n)R.",
        b"\x82\x01.",
        b"cos\nsystem\n",
        b"(ios\nsystem\n.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8b\xff\xff\xff\x7f1.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"ccollections\nOrderedDict\n)\x81.",
        b"\xff.",
    ],
)
def test_damaged_and_foreign_pickles_are_refused(body: bytes) -> None:
    with pytest.raises(UnsafePickle):
        read_pickle(OPEN + body)


def test_a_huge_memo_index_costs_nothing() -> None:
    assert read_pickle(OPEN + b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff.")[0] is None


def test_every_cut_of_a_pickle_is_refused() -> None:
    data = tensor_pickle()
    for length in range(len(data)):
        with pytest.raises(UnsafePickle):
            read_pickle(data[:length])


LATER = b"ctorch._utils\n_rebuild_tensor_v3\n"
UNTYPED = b"ctorch.storage\nUntypedStorage\n"
EMPTY = b"ccollections\nOrderedDict\n)R"


def later_tensor(count: int, shape: bytes, kind: bytes, *, start: bytes = LATER) -> bytes:
    """Return a pickle of a tensor over `count` bytes of storage."""
    storage = b"(X\x07\x00\x00\x00storage" + UNTYPED + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK"
    storage += bytes([count]) + b"tQ"
    return (
        b"\x80\x02" + start + b"(" + storage + b"K\x00K" + shape + b"\x85K\x01\x85\x89" + EMPTY
        + b"ctorch\n" + kind + b"\n" + b"tR."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [(b"float8_e4m3fn", "f8_e4m3", 1), (b"float8_e8m0fnu", "f8_e8m0", 1), (b"uint32", "u32", 4)],
)
def test_types_without_a_storage_class_are_described(kind: bytes, dtype: str, size: int) -> None:
    value, _ = read_pickle(later_tensor(8 * size, b"\x08", kind))
    assert isinstance(value, PickledTensor)
    assert (value.dtype, value.shape, value.nbytes) == (dtype, (8,), 8 * size)
    with pytest.raises(UnsafePickle, match="invalid shape"):
        read_pickle(later_tensor(8 * size - 1, b"\x08", kind))


@pytest.mark.parametrize("kind", [b"FloatStorage", b"float4_e2m1fn_x2", b"Size"])
def test_other_names_are_no_types(kind: bytes) -> None:
    with pytest.raises(UnsafePickle, match=r"no known type|imports"):
        read_pickle(later_tensor(8, b"\x08", kind))


def test_a_storage_of_bytes_needs_a_type() -> None:
    start = b"ctorch._utils\n_rebuild_tensor_v2\n"
    with pytest.raises(UnsafePickle, match=r"without a type"):
        read_pickle(later_tensor(8, b"\x08", b"float8_e4m3fn", start=start))
