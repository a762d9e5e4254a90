"""Finds quantized weights among tensors by their names, types and shapes, and checks these.

A quantized matrix is stored as several tensors; `backends.pytorch.dequantize` computes its values.
Sources: the layouts of AutoGPTQ, AutoAWQ, bitsandbytes, compressed-tensors, NVIDIA ModelOpt, and
transformers' FP8 and MXFP4.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from backends.hf.header import broken
from backends.hf.quantization import MAX_STATE_BYTES, Scheme, read_bnb_state
from core.errors import BrokenModel

Kind: TypeAlias = Literal["gptq", "awq", "int32", "grid", "fp4", "mxfp4", "bnb4"]

_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_SCALE_TYPES = _FLOAT8 | {"F16", "BF16", "F32", "F64", "F8_E8M0", "U8"}
_FP4_GROUPS = (16, 32)


class StoredTensor(Protocol):
    """A tensor of any weight file; `dtype` is named as in safetensors."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized weight: its name and shape in the model, and the tensors that hold it.

    `parts` maps roles to stored names: `values`, and as the kind needs `scales`, `zeros`,
    `groups` (the group of each column), `factor` or `divisor` (one for all scales), `state`.
    A bnb4 weight's shape is in its state: without its content it is flat.  `group_size`: columns
    per scale; `block`: rows and columns per scale of a grid.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    bits: int = 0
    group_size: int = 0
    block: tuple[int, int] = (1, 1)
    adds_one: bool = False


class PackedFinder:
    """Collects the packed weights of one scheme; `read` returns the content of a small tensor."""

    def __init__(
        self,
        config: Path,
        scheme: Scheme,
        tensors: Mapping[str, StoredTensor],
        read: Callable[[str], bytes] | None,
    ) -> None:
        self._config = config
        self._scheme = scheme
        self._tensors = tensors
        self._read = read

    def find(self) -> tuple[PackedWeight, ...]:
        """Return all packed weights.  Raises BrokenModel."""
        readers: Mapping[str, Callable[[str], PackedWeight | None]] = {
            "gptq": self._gptq,
            "awq": self._awq,
            "bitsandbytes": self._bitsandbytes,
            "compressed-tensors": self._compressed,
            "mxfp4": self._mxfp4,
        }
        read = readers.get(self._scheme.method, self._scaled)
        found = (read(name) for name in self._tensors)
        return tuple(each for each in found if each is not None)

    def _gptq(self, name: str) -> PackedWeight | None:
        """Return a matrix of words along its columns, stored transposed."""
        if not name.endswith(".qweight"):
            return None
        base = name.removesuffix(".qweight")
        words = self._matrix(name, ("I32", "U32"))
        scales = self._matrix(f"{base}.scales", _SCALE_TYPES)
        zeros = self._matrix(f"{base}.qzeros", ("I32", "U32"))
        bits = 32 * zeros[1] // scales[1] if scales[1] else 0
        columns = words[0] * 32 // bits if bits else 0
        parts = {"values": name, "scales": f"{base}.scales", "zeros": f"{base}.qzeros"}
        if f"{base}.g_idx" in self._tensors:
            parts["groups"] = f"{base}.g_idx"
            self._expect(f"{base}.g_idx", (columns,), ("I32", "I64"))
        group = self._group(base, columns, scales[0])
        is_sound = (
            bits in (2, 3, 4, 8)
            and words[1] == scales[1]
            and zeros == (scales[0], scales[1] * bits // 32)
            and words[0] * 32 == columns * bits
        )
        self._agree(base, is_sound and self._is_declared(bits), f"{bits} bits")
        shape = (scales[1], columns)
        add = self._scheme.adds_one
        return PackedWeight(f"{base}.weight", "gptq", shape, parts, bits, group, adds_one=add)

    def _awq(self, name: str) -> PackedWeight | None:
        """Return a matrix of 4-bit values in words along its rows, stored transposed."""
        if not name.endswith(".qweight"):
            return None
        base = name.removesuffix(".qweight")
        words = self._matrix(name, ("I32", "U32"))
        scales = self._matrix(f"{base}.scales", _SCALE_TYPES)
        parts = {"values": name, "scales": f"{base}.scales"}
        is_sound = words[1] * 8 == scales[1]
        if f"{base}.qzeros" in self._tensors:
            parts["zeros"] = f"{base}.qzeros"
            is_sound &= self._matrix(f"{base}.qzeros", ("I32", "U32")) == (scales[0], words[1])
        self._agree(base, is_sound, f"shapes {list(words)} and {list(scales)}")
        group = self._group(base, words[0], scales[0])
        return PackedWeight(f"{base}.weight", "awq", (scales[1], words[0]), parts, 4, group)

    def _bitsandbytes(self, name: str) -> PackedWeight | None:
        if name.endswith(".SCB"):
            base = name.removesuffix("SCB")
            shape = self._matrix(f"{base}weight", ("I8",))
            self._expect(name, (shape[0],), ("F32", "F16", "BF16"))
            self._agree(base, self._scheme.bits == 8, "8-bit values")
            parts = {"values": f"{base}weight", "scales": name}
            return PackedWeight(f"{base}weight", "grid", shape, parts, 8, block=(1, shape[1]))
        if not name.endswith(".weight.absmax"):
            return None
        base = name.removesuffix(".absmax")
        parts = {"values": base, "scales": name}
        for role, part in (
            ("map", "quant_map"),
            ("nested_scales", "nested_absmax"),
            ("nested_map", "nested_quant_map"),
        ):
            if f"{base}.{part}" in self._tensors:
                parts[role] = f"{base}.{part}"
                self._floats(parts[role], "numbers")
        states = [
            key
            for kind in ("nf4", "fp4")
            if (key := f"{base}.quant_state.bitsandbytes__{kind}") in self._tensors
        ]
        stored = self._tensors.get(base)
        is_sound = stored is not None and stored.dtype == "U8" and bool(states) and "map" in parts
        is_sound &= all(self._tensors[key].dtype == "U8" for key in states)
        self._floats(name, "numbers")
        self._agree(base, is_sound and self._scheme.bits == 4, "incomplete 4-bit values")
        assert stored is not None
        parts["state"] = states[0]
        count = 2 * math.prod(stored.shape)
        return PackedWeight(base, "bnb4", self._bnb_shape(states[0], count), parts, 4)

    def _bnb_shape(self, name: str, count: int) -> tuple[int, ...]:
        if self._read is None:
            return (count,)
        self._agree(name, math.prod(self._tensors[name].shape) <= MAX_STATE_BYTES, "no short state")
        try:
            return read_bnb_state(self._read(name), count).shape
        except ValueError as problem:
            raise self._problem(f"{name[:80]!r}: {problem}") from problem

    def _compressed(self, name: str) -> PackedWeight | None:
        if not name.endswith(".weight_packed"):
            return self._scaled(name)
        base = name.removesuffix("_packed")
        if self._tensors[name].dtype == "U8":
            return self._fp4(name, base, divisor=f"{base}_global_scale")
        words = self._matrix(name, ("I32",))
        scales = self._matrix(f"{base}_scale", _SCALE_TYPES)
        parts = {"values": name, "scales": f"{base}_scale"}
        self._expect(f"{base}_shape", (2,), ("I64", "I32"))
        parts["state"] = f"{base}_shape"
        fitting = {
            (bits, columns, group)
            for bits, size in self._scheme.choices
            if (found := _columns(words[1], bits, scales[1], size)) is not None
            for columns, group in [found]
        }
        is_sound = len(fitting) == 1 and scales[0] in (1, words[0])
        self._agree(base, is_sound, f"shapes {list(words)} and {list(scales)}")
        bits, columns, group = fitting.pop()
        if f"{base}_zero_point" in self._tensors:
            parts["zeros"] = f"{base}_zero_point"
            rows = _ceil(scales[0], 32 // bits)
            self._expect(parts["zeros"], (rows, scales[1]), ("I32",))
        if f"{base}_g_idx" in self._tensors:
            parts["groups"] = f"{base}_g_idx"
            self._expect(parts["groups"], (columns,), ("I32", "I64"))
        return PackedWeight(base, "int32", (words[0], columns), parts, bits, group)

    def _scaled(self, name: str) -> PackedWeight | None:
        """Return 8-bit values with a grid of scales, or ModelOpt's 4-bit floats."""
        stored = self._tensors[name]
        is_modelopt = self._scheme.method == "modelopt"
        if is_modelopt and stored.dtype == "U8" and f"{name}_scale_2" in self._tensors:
            return self._fp4(name, name, factor=f"{name}_scale_2")
        if stored.dtype not in _FLOAT8 | {"I8"} or name.endswith(("_scale", "_scale_inv")):
            return None
        is_integer = stored.dtype == "I8"
        if is_integer and name.endswith("_zero_point"):
            return None
        module = name.removesuffix(".weight")
        names = (f"{name}_scale_inv", f"{name}_scale", f"{module}.scale", f"{module}.qscale_weight")
        scale = next((each for each in names if each in self._tensors and each != name), None)
        if scale is None:
            self._agree(name, not name.endswith(".weight"), "no scales")
            return None
        self._agree(name, self._has_width(8), "8-bit values")
        self._agree(name, not is_integer or self._allows_integers(), "8-bit integers")
        parts = {"values": name, "scales": scale}
        zeros = f"{name}_zero_point"
        if zeros in self._tensors:
            parts["zeros"] = zeros
            self._expect(zeros, self._tensors[scale].shape, ("I8",))
        block = self._block(name, stored.shape, self._tensors[scale])
        return PackedWeight(name, "grid", stored.shape, parts, 8, block=block)

    def _block(self, name: str, shape: tuple[int, ...], scale: StoredTensor) -> tuple[int, int]:
        """Return the rows and columns of one scale."""
        grid = _grid(shape, scale.shape)
        found = f"shapes {list(shape)} and {list(scale.shape)}"
        if grid is None or scale.dtype not in _SCALE_TYPES:
            raise self._problem(f"{name[:80]!r} has {found}")
        rows, columns = shape[-2:]
        declared = self._scheme.block
        if declared and grid == (_ceil(rows, declared[0]), _ceil(columns, declared[1])):
            return declared
        is_even = rows % grid[0] == 0 and columns % grid[1] == 0
        # Blocks that were declared and do not fit: only one scale a row or tensor may differ.
        self._agree(name, is_even and (not declared or grid[1] == 1), found)
        return rows // grid[0], columns // grid[1]

    def _fp4(self, name: str, base: str, *, factor: str = "", divisor: str = "") -> PackedWeight:
        """Return pairs of 4-bit floats in bytes, the first one in the low half."""
        self._agree(name, self._has_width(4), "4-bit values")
        values = self._matrix(name, ("U8",))
        scales = self._matrix(f"{base}_scale", _FLOAT8 | {"U8", "F8_E8M0"})
        columns = 2 * values[1]
        parts = {"values": name, "scales": f"{base}_scale"}
        for role, part in (("factor", factor), ("divisor", divisor)):
            if part in self._tensors:
                parts[role] = part
                self._floats(part, "one number")
                self._agree(base, math.prod(self._tensors[part].shape) == 1, "several factors")
        group = columns // scales[1] if scales[1] else 0
        is_sound = scales[0] == values[0] and group * scales[1] == columns
        self._agree(base, is_sound and group in _FP4_GROUPS, f"{group} columns per scale")
        return PackedWeight(base, "fp4", (values[0], columns), parts, 4, group)

    def _mxfp4(self, name: str) -> PackedWeight | None:
        """Return the experts of GPT-OSS: the model keeps each one transposed."""
        if not name.endswith("_blocks"):
            return None
        base = name.removesuffix("_blocks")
        blocks = self._tensors[name]
        shape = blocks.shape
        is_sound = len(shape) == 4 and blocks.dtype == "U8" and shape[3] == 16
        self._agree(base, is_sound and math.prod(shape) > 0, f"blocks of shape {list(shape)}")
        self._expect(f"{base}_scales", shape[:3], ("U8", "F8_E8M0"))
        parts = {"values": name, "scales": f"{base}_scales"}
        return PackedWeight(base, "mxfp4", (shape[0], shape[2] * 32, shape[1]), parts, 4, 32)

    def _group(self, base: str, columns: int, groups: int) -> int:
        """Return the columns per group, which must be the declared ones."""
        declared = self._scheme.group_size
        size = columns if declared == -1 else declared
        if self._scheme.is_mixed and groups and _ceil(columns, size or 1) != groups:
            size = _ceil(columns, groups)
        is_sound = columns > 0 and groups > 0 and _ceil(columns, size) == groups
        self._agree(base, is_sound, f"{groups} groups for {columns} columns")
        return size

    def _allows_integers(self) -> bool:
        return self._scheme.method == "compressed-tensors"

    def _has_width(self, bits: int) -> bool:
        """Whether weights of `bits` are declared; mixed ones without a list may have any."""
        widths = {width for width, _ in self._scheme.choices} or {self._scheme.bits}
        return bits in widths or widths == {0}

    def _is_declared(self, bits: int) -> bool:
        return self._scheme.is_mixed or bits == self._scheme.bits

    def _matrix(self, name: str, dtypes: Iterable[str]) -> tuple[int, int]:
        stored = self._tensors.get(name)
        if stored is None:
            raise self._problem(f"the tensor {name[:80]!r} is missing")
        if len(stored.shape) != 2 or stored.dtype not in dtypes:
            raise self._problem(
                f"the tensor {name[:80]!r} is {stored.dtype} of shape {list(stored.shape)}"
            )
        return stored.shape[0], stored.shape[1]

    def _floats(self, name: str, wanted: str) -> None:
        if self._tensors[name].dtype not in _SCALE_TYPES:
            raise self._problem(f"{name[:80]!r} is {self._tensors[name].dtype}, not {wanted}")

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> None:
        stored = self._tensors.get(name)
        if stored is None:
            raise self._problem(f"the tensor {name[:80]!r} is missing")
        if stored.shape != shape or stored.dtype not in dtypes:
            raise self._problem(
                f"the tensor {name[:80]!r} is {stored.dtype} of shape {list(stored.shape)}, not "
                f"of shape {list(shape)}"
            )

    def _agree(self, name: str, is_sound: bool, found: str) -> None:
        if not is_sound:
            raise self._problem(f"{name[:80]!r} has {found}")

    def _problem(self, found: str) -> BrokenModel:
        scheme = self._scheme
        declared = [scheme.label]
        declared += [f"bits {scheme.bits}"] if scheme.bits else []
        declared += [f"group size {scheme.group_size}"] if scheme.group_size else []
        declared += [f"blocks of {scheme.block[0]}x{scheme.block[1]}"] if scheme.block else []
        return broken(
            self._config,
            f"the weights do not match its quantization_config ({', '.join(declared)}): {found}; "
            "download both again",
        )


def _columns(words: int, bits: int, groups: int, size: int) -> tuple[int, int] | None:
    """Return the columns and the group size of rows of `words`; None if they do not match.

    `size` is at most 0 for one group a row.  The last word of a row may be filled up.
    """
    per_word = 32 // bits
    columns = groups * size if size > 0 else words * per_word
    if columns < 1 or _ceil(columns, per_word) != words or (size <= 0 and groups != 1):
        return None
    return columns, size if size > 0 else columns


def _grid(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the rows and columns of scales for each matrix of `shape`; None if impossible."""
    if len(shape) < 2 or not math.prod(shape) or not math.prod(scale):
        return None
    if math.prod(scale) == 1 or scale == shape[:-2]:
        return 1, 1
    if len(scale) == len(shape) and scale[:-2] == shape[:-2]:
        return scale[-2], scale[-1]
    return (shape[0], 1) if len(shape) == 2 and scale == (shape[0],) else None


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
