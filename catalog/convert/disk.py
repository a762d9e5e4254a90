"""Predicts the disk space of a conversion, and bounds that of all of them."""

import os
import shutil
from pathlib import Path

from backends.base import ModelInfo
from catalog.convert.graph import GGUF_QUANTIZED, MLX_BITS, ORIGINAL
from catalog.convert.support import ONNX_BUILT
from catalog.models import PROVENANCE
from core.errors import InsufficientDisk, RequestError
from core.units import MIB, format_bytes

_SPARE_BYTES = 256 * MIB
# Upper bounds of the bits per weight, including scales.
_BITS = {
    "f32": 32.0, "f16": 16.5, "bf16": 16.5, "mixed": 17.0, "original": 32.0, "int8": 12.0,
    "int4": 8.0,
}  # fmt: skip
_WIDEST_QUANTIZED = 10.0
# Usual bits per weight, including scales; of GGUF's as llama.cpp's `quantize` states them.
_USUAL_BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "mixed": 16.0, "int8": 9.0, "int4": 5.0,
    "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9, "q4_1": 5.1, "q4_0": 4.6,
    "q3_k_m": 3.9, "q2_k": 3.2,
}  # fmt: skip
# MLX stores a scale and a bias of 16 bits for each group.
_GROUP_BITS = 32


def result_bytes(source: ModelInfo, quantization: str, group_size: int) -> int:
    """Return about how many bytes the result takes."""
    if quantization == ORIGINAL or not source.parameters:
        return source.size_bytes
    bits = _USUAL_BITS.get(quantization, _WIDEST_QUANTIZED)
    if quantization in MLX_BITS:
        bits = MLX_BITS[quantization] + _GROUP_BITS / group_size
    return int(source.parameters * bits / 8)


def needed_disk_bytes(
    source: ModelInfo, quantization: str, route: tuple[str, ...], exporter: str = "auto"
) -> int:
    """Return the most bytes that the result and the files on the way to it take at once."""
    parameters = source.parameters or source.size_bytes // 2
    bits = _BITS.get(quantization, _WIDEST_QUANTIZED)
    # llama.cpp quantizes from a file in 32 bits.
    is_for_gguf = source.format == "safetensors" and quantization in GGUF_QUANTIZED
    through_f32 = len(route) > 2 or is_for_gguf
    needed = int(parameters * bits / 8) + _SPARE_BYTES
    if route[-1] == "onnx":
        needed += _onnx_bytes(source, parameters, quantization, exporter)
    return needed + (parameters * 4 if through_f32 else 0)


def require_space(
    source: ModelInfo,
    target: Path,
    quantization: str,
    route: tuple[str, ...],
    exporter: str = "auto",
) -> None:
    """Check that the disk has room for the result and the intermediate files.

    Raises InsufficientDisk with both numbers, RequestError if the parent folder is missing.
    """
    if not target.parent.is_dir():
        raise RequestError(
            f"The folder {target.parent} does not exist; create it first.", param="target"
        )
    needed = needed_disk_bytes(source, quantization, route, exporter)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise InsufficientDisk(
            f"The conversion needs up to {format_bytes(needed)} of disk space, but only "
            f"{format_bytes(free)} are free. Free some space, then convert again."
        )


def converted_bytes(folder: Path) -> int:
    """Return the bytes of the converted models in the folders below `folder`; blocks."""
    found = {path.parent for path in folder.glob(f"*/*/{PROVENANCE}")}
    return sum(_folder_bytes(made) for made in found)


def require_share(folder: Path, expected_bytes: int, limit_bytes: int) -> None:
    """Raise InsufficientDisk if all converted models would take more than `limit_bytes`; blocks.

    `expected_bytes` is what is to be added to those in the folders below `folder`.
    """
    used = converted_bytes(folder)
    if used + expected_bytes > limit_bytes:
        raise InsufficientDisk(
            f"The conversion adds about {format_bytes(expected_bytes)} to converted models of "
            f"{format_bytes(used)}; IMPETUS_CONVERSION_DISK allows {format_bytes(limit_bytes)} for "
            "all of them. Delete converted models, or raise the setting and restart the server."
        )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def _onnx_bytes(source: ModelInfo, parameters: int, quantization: str, exporter: str) -> int:
    """Return what an export to ONNX writes besides: a copy in f32, and embeddings in f32.

    PyTorch's exporter needs the copy for all other types, the builder for mixed ones.
    """
    is_built = source.architecture in ONNX_BUILT and exporter != "torch"
    is_mapped = source.quantization in ("f32", *(("bf16", "f16") if is_built else ()))
    copy = 0 if is_mapped or source.format == "gguf" else parameters * 4
    sizes = [source.details.get(name) for name in ("n_embd", "vocabulary_size")]
    width, tokens = (size if type(size) is int else 0 for size in sizes)
    return copy + (0 if quantization == "f32" else min(width * tokens, parameters) * 4)
