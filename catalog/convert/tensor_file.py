"""Writes safetensors shards piece by piece, so that no tensor has to be in memory as a whole.

The safetensors library writes only what is in memory.  Source: the format's description in its
repository's README; tensors stand in the order of falling element size, which aligns them.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from backends.hf.header import DTYPE_BITS
from catalog.convert.job import write_json
from core.errors import BrokenModel

SHARD_BYTES = 4 * 10**9
# Values that are handed over at once, whatever their type.
PIECE_ELEMENTS = 1 << 22
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is computed while it is written.

    `dtype` is the name in safetensors, such as `BF16`.  `pieces` computes the values in order, as
    contiguous arrays of any type whose bytes are those of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in the file."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def rows_at_once(shape: Sequence[int], multiple: int = 1) -> int:
    """Return how many rows of a tensor make a piece: at least one times `multiple`."""
    rows = PIECE_ELEMENTS // max(1, prod(shape[1:]))
    return max(1, rows // multiple) * multiple


def head_rows(shape: Sequence[int], heads: int) -> int:
    """Return how many rows of a tensor each of its heads has; they are reordered in pairs.

    Raises BrokenModel if they are no whole pairs.
    """
    if shape[0] % (2 * heads):
        raise BrokenModel(f"{shape[0]} rows cannot be split into {heads} heads.", param="model")
    return shape[0] // heads


def write_tensors(
    folder: Path,
    tensors: Iterable[LazyTensor],
    *,
    metadata: Mapping[str, str],
    on_progress: Callable[[float], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or several shards and their index, into `folder`.

    Blocks; `on_progress` gets the written share from 0 to 1.  Raises BrokenModel for a name that
    occurs twice, and for a tensor whose values are more or fewer than its shape says.
    """
    listed = list(tensors)
    _check_names(listed)
    shards = _split(listed, shard_bytes)
    total = sum(tensor.nbytes for tensor in listed)
    written, places = 0, {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(_header(shard, metadata))
            for tensor in shard:
                _write_tensor(file, tensor)
                written += tensor.nbytes
                on_progress(written / max(total, 1))
                places[tensor.name] = name
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _check_names(tensors: Sequence[LazyTensor]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise BrokenModel(
                f"The weights contain the tensor {tensor.name!r} twice.", param="model"
            )
        seen.add(tensor.name)
    if not seen:
        raise BrokenModel("The weights do not contain any tensors.", param="model")


def _split(tensors: Sequence[LazyTensor], shard_bytes: int) -> list[list[LazyTensor]]:
    """Group the tensors into files; a tensor larger than a file's limit gets its own."""
    shards: list[list[LazyTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -DTYPE_BITS[tensor.dtype]) for shard in shards]


def _header(shard: Sequence[LazyTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, tensor: LazyTensor) -> None:
    written = 0
    for piece in tensor.pieces():
        data = piece.reshape(-1).view("u1")
        written += data.nbytes
        if written > tensor.nbytes:
            break
        file.write(data.data)
    if written != tensor.nbytes:
        raise BrokenModel(
            f"The tensor {tensor.name!r} does not have the values that its shape "
            f"{list(tensor.shape)} says; the file may be damaged. Download the model again.",
            param="model",
        )
