"""Weights of an ONNX model that are computed in pieces while its data file is written.

onnx_ir writes an initializer by its method `tofile`, one after the other, so that no tensor has to
be in memory as a whole.  Sources: onnx_ir's LazyTensor, and the layout of the operator MatMulNBits
in onnxruntime's ContribOperators.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from catalog.convert.steps.dtypes import raw_bytes
from catalog.convert.tensor_file import PIECE_ELEMENTS

# A transposed weight is read once per piece, so that large ones have larger pieces.
_TRANSPOSED_PIECES = 16


class Stacked:
    """Matrices of PyTorch one below the other, or their transpose, without a copy of them."""

    def __init__(self, parts: Sequence[Any], *, is_transposed: bool = False) -> None:
        self._parts = [part.detach() for part in parts]
        self._is_transposed = is_transposed

    @classmethod
    def of(cls, matrix: Any) -> "Stacked":
        """Return a matrix of PyTorch as a stack, transposed if its memory is."""
        is_transposed = not matrix.is_contiguous() and matrix.T.is_contiguous()
        return cls([matrix.T if is_transposed else matrix], is_transposed=is_transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows = sum(int(part.shape[0]) for part in self._parts)
        columns = int(self._parts[0].shape[1])
        return (columns, rows) if self._is_transposed else (rows, columns)

    @property
    def T(self) -> "Stacked":
        """The transpose, under PyTorch's name for it."""
        return Stacked(self._parts, is_transposed=not self._is_transposed)

    @property
    def is_transposed(self) -> bool:
        """Whether columns, not rows, stand together in memory."""
        return self._is_transposed

    def rows(self, start: int, stop: int) -> Any:
        """Return a copy of some rows, or a view of them; not contiguous in every case."""
        if self._is_transposed:
            return _stacked([part[:, start:stop] for part in self._parts]).T
        found, offset = [], 0
        for part in self._parts:
            end = offset + int(part.shape[0])
            if start < end and offset < stop:
                found.append(part[max(start - offset, 0) : stop - offset])
            offset = end
        return _stacked(found)


def _stacked(parts: Sequence[Any]) -> Any:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True, slots=True)
class Pieces:
    """What onnx_ir asks of a tensor when it writes it: arrays whose bytes make it up, in order.

    `shape` is the whole tensor's, `dtype` NumPy's type of its elements.
    """

    shape: tuple[int, ...]
    dtype: Any
    pieces: Callable[[], Iterator[NDArray[Any]]]

    def tofile(self, file: BinaryIO) -> None:
        """Write all bytes."""
        for piece in self.pieces():
            file.write(piece.reshape(-1).view(np.uint8).data)
            # The next one is computed before its name is bound again.
            del piece

    def tobytes(self) -> bytes:
        """Return all bytes."""
        return b"".join(piece.tobytes() for piece in self.pieces())

    def numpy(self) -> NDArray[Any]:
        """Return the whole tensor."""
        return np.frombuffer(self.tobytes(), self.dtype).reshape(self.shape)


def cast_pieces(weight: Stacked, dtype: Any) -> Iterator[NDArray[Any]]:
    """Yield the rows of a matrix as bytes of PyTorch's `dtype`."""
    rows, columns = weight.shape
    elements = PIECE_ELEMENTS
    if weight.is_transposed:
        elements = max(elements, rows * columns // _TRANSPOSED_PIECES)
    count = max(1, elements // max(1, columns))
    for start in range(0, rows, count):
        yield raw_bytes(weight.rows(start, min(start + count, rows)).to(dtype))


@dataclass(slots=True)
class QuantizedWeight:
    """The matrix K x N of a MatMul, quantized in blocks of `block_size` values of a column.

    `quantize` is onnxruntime's, and returns packed values (N, K / block_size, bytes of a block)
    and scales (N, K / block_size) of a matrix in f32.
    """

    weight: Stacked
    bits: int
    block_size: int
    quantize: Callable[[NDArray[Any]], tuple[NDArray[Any], ...]]
    _scales: list[NDArray[Any]] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Blocks of a column."""
        return -(-self.weight.shape[0] // self.block_size)

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """Shape of the packed values, which are bytes."""
        return (self.weight.shape[1], self.blocks, self.block_size * self.bits // 8)

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape of the scales, which are in f32."""
        return (self.weight.shape[1], self.blocks)

    def packed_pieces(self) -> Iterator[NDArray[Any]]:
        """Yield the packed values; the scales, a small part, are kept until they are asked for."""
        self._scales = []
        for packed, scales in self._quantized():
            self._scales.append(scales)
            yield packed

    def scales_pieces(self) -> Iterator[NDArray[Any]]:
        """Yield the scales."""
        kept, self._scales = self._scales, []
        yield from kept or (scales for _, scales in self._quantized())

    def _quantized(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        import torch

        # A column of the matrix is a row of its transpose.
        columns = self.weight.T
        total, length = columns.shape
        count = max(1, PIECE_ELEMENTS // max(1, length))
        for start in range(0, total, count):
            part = columns.rows(start, min(start + count, total)).to(torch.float32)
            packed, scales, *_ = self.quantize(part.T.contiguous().numpy())
            yield packed, scales
