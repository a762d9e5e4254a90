"""Reads the state that bitsandbytes stores beside a 4-bit weight: JSON in bytes.

Source: bitsandbytes' `QuantState.as_dict`.
"""

import json
import math
from dataclasses import dataclass

MAX_STATE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class BnbState:
    """A 4-bit weight's shape, the weights per scale, and how the scales are quantized."""

    shape: tuple[int, ...]
    block_size: int
    nested_block_size: int
    nested_offset: float


def read_bnb_state(data: bytes, count: int) -> BnbState:
    """Return the state in `data`, of a weight of `count` values, or one less.

    Raises ValueError if it is not one.
    """
    if len(data) > MAX_STATE_BYTES:
        raise ValueError(f"its quant_state has {len(data)} bytes; at most {MAX_STATE_BYTES} do")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise ValueError("its quant_state is not valid JSON") from problem
    if not isinstance(found, dict):
        raise ValueError("its quant_state is not an object")
    shape, size = found.get("shape"), found.get("blocksize")
    nested, offset = found.get("nested_blocksize"), found.get("nested_offset")
    nested = 256 if nested is None else nested
    offset = 0.0 if offset is None else offset
    is_sound = (
        isinstance(shape, list)
        and 1 <= len(shape) <= 4
        and all(type(each) is int and each > 0 for each in (*shape, size, nested))
        and isinstance(offset, float | int)
        and math.prod(shape) in (count, count - 1)
    )
    if not is_sound or not isinstance(shape, list) or not isinstance(size, int):
        raise ValueError(
            f"its quant_state has shape {str(shape)[:60]} and blocksize {str(size)[:20]} for "
            f"{count} values"
        )
    return BnbState(tuple(shape), size, nested, float(offset))
