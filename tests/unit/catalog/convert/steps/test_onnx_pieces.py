"""Pieces of weights make up what the whole would be."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from catalog.convert.steps import onnx_pieces
from catalog.convert.steps.onnx_pieces import Pieces, QuantizedWeight, Stacked, cast_pieces

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_pieces, "PIECE_ELEMENTS", 40)


def matrices() -> list[Any]:
    torch.manual_seed(0)
    return [torch.randn(rows, 12).to(torch.bfloat16) for rows in (7, 1, 10)]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (6, 9), (3, 12), (11, 12)])
def test_rows_are_those_of_the_joined_matrix(is_transposed: bool, start: int, stop: int) -> None:
    parts = matrices()
    joined, stack = torch.cat(parts), Stacked(parts)
    if is_transposed:
        joined, stack = joined.T, stack.T
    assert stack.shape == tuple(joined.shape)
    assert torch.equal(stack.rows(start, stop), joined[start:stop])


def test_a_transposed_view_is_read_along_its_memory() -> None:
    matrix = matrices()[2]
    assert not Stacked.of(matrix).is_transposed
    view = Stacked.of(matrix.T)
    assert view.is_transposed
    assert torch.equal(view.rows(0, 12), matrix.T)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_cast_matrix_is_written_in_several_pieces(is_transposed: bool) -> None:
    joined, stack = torch.cat(matrices()), Stacked(matrices())
    if is_transposed:
        joined, stack = joined.T, stack.T
    wanted = joined.to(torch.float32).numpy()
    pieces = Pieces(stack.shape, np.float32, lambda: cast_pieces(stack, torch.float32))
    assert len(list(pieces.pieces())) > 2
    file = io.BytesIO()
    pieces.tofile(file)
    assert file.getvalue() == pieces.tobytes() == wanted.tobytes()
    assert np.array_equal(pieces.numpy(), wanted)


@pytest.mark.parametrize("bits", [4, 8])
# Five columns a piece; the last block of 40 rows is not a whole one.
@pytest.mark.parametrize("shape", [(40, 23), (64, 3)])
def test_a_matrix_quantized_in_pieces_is_the_whole_one_quantized(
    bits: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_pieces, "PIECE_ELEMENTS", 200)
    module = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    config = module.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=bits)
    quantizer = module.DefaultWeightOnlyQuantizer(config)
    torch.manual_seed(0)
    matrix = torch.randn(shape[1], shape[0]).T
    packed, scales, _ = quantizer.qbits_block_quant(matrix.contiguous().numpy())
    weight = QuantizedWeight(Stacked.of(matrix), bits, 32, quantizer.qbits_block_quant)
    assert (weight.packed_shape, weight.scales_shape) == (packed.shape, scales.shape)
    # Without the packed values, the scales are computed for themselves.
    for _ in range(2):
        assert joined(weight.scales_pieces()) == scales.tobytes()
        assert joined(weight.packed_pieces()) == packed.tobytes()


def joined(pieces: Iterator[Any]) -> bytes:
    return b"".join(piece.tobytes() for piece in pieces)
