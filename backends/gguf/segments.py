"""Token vectors with the segment of a pair's second text, which llama.cpp does not add itself.

llama.cpp gives every token the vector of segment 0 (bert.cpp, build_arch_graph), so cross-encoders
that were trained with two segments are given vectors instead of token ids.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.header import GgufFile, TensorPlace
from backends.gguf.layout import TENSOR_TYPES
from core.errors import BrokenModel

_BLOCKS = {name: (elements, size) for name, elements, size in TENSOR_TYPES.values()}


@dataclass(frozen=True, slots=True)
class SegmentVectors:
    """The rows of the token table, still quantized and memory-mapped; `step` is segment 1 minus 0.

    `rows` is uint8 (vocabulary, bytes of a row), `step` float32 (width,).
    """

    rows: NDArray[np.uint8]
    type_name: str
    step: NDArray[np.float32]

    def of(self, ids: NDArray[Any], types: NDArray[Any]) -> NDArray[np.float32]:
        """Return the vectors (tokens, width) of token ids in these segments, 0 or 1."""
        vectors = _dequantized(np.ascontiguousarray(self.rows[ids]), self.type_name)
        return np.ascontiguousarray(vectors + types[:, None] * self.step, np.float32)


def open_segments(file: GgufFile) -> SegmentVectors | None:
    """Return the token vectors of the model in `file`; None if it knows only one segment.

    Raises BrokenModel for a type that the gguf package cannot read.
    """
    table, kinds = file.places.get("token_embd.weight"), file.places.get("token_types.weight")
    width = file.number(f"{file.architecture}.embedding_length", 1, 2**24)
    if table is None or kinds is None or not width or kinds.elements < 2 * width:
        return None
    types = _dequantized(_mapped(file, kinds, width)[:2], kinds.type_name)
    step = np.asarray(types[1] - types[0], np.float32)
    return SegmentVectors(_mapped(file, table, width), table.type_name, step)


def _mapped(file: GgufFile, place: TensorPlace, width: int) -> NDArray[np.uint8]:
    """Map a matrix with rows of `width` elements; uint8 (rows, bytes of a row)."""
    block_elements, block_bytes = _BLOCKS[place.type_name]
    row_bytes = width // block_elements * block_bytes
    shape = (place.elements // width, row_bytes)
    return np.memmap(file.path, np.uint8, "r", place.offset, shape)


def _dequantized(rows: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType[type_name.upper()]
        return np.asarray(dequantize(np.ascontiguousarray(rows), kind), np.float32)
    except (KeyError, NotImplementedError, ValueError) as problem:
        raise BrokenModel(
            f"The token vectors of the reranking model are of the type {type_name}, which cannot "
            "be read here; use another quantization.",
            param="model",
        ) from problem
