"""Reads the array headers of an `.npz` file, the weights format of early MLX models."""

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from core.errors import BrokenModel, NotThisFormat

_END_RECORD = b"PK\x05\x06"
_END_RECORD_BYTES = 22
_MAX_COMMENT_BYTES = 65_535
_MAX_DIRECTORY_BYTES = 32 * 1024 * 1024
_MAX_ARRAYS = 100_000
_MAX_DIMENSIONS = 8

# Source: numpy.lib.format; MLX writes bfloat16 as 2-byte void (V2).
_DTYPES: Mapping[str, str] = {
    "f8": "F64", "f4": "F32", "f2": "F16", "V2": "BF16", "u4": "U32", "u2": "U16", "u1": "U8",
    "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "b1": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NpzEntry:
    """One array; `dtype` is named as in safetensors."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_npz(path: Path) -> Mapping[str, NpzEntry]:
    """Return the arrays of a file by name, from their headers only.

    Raises NotThisFormat for other files, BrokenModel for damaged ones.
    """
    _check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > _MAX_ARRAYS:
                raise _broken(
                    path, f"it holds {len(members):,} arrays; at most {_MAX_ARRAYS:,} are allowed"
                )
            if not members or not all(each.filename.endswith(".npy") for each in members):
                raise NotThisFormat(f"{path.name}: a zip archive, but not of npy arrays")
            return {
                member.filename.removesuffix(".npy"): _entry(path, archive, member)
                for member in members
            }
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _broken(path, str(error) or "it cannot be read") from error


def _check_directory(path: Path) -> None:
    """Check that the file is an archive whose directory is small enough to read."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            size = file.seek(0, 2)
            file.seek(max(0, size - _END_RECORD_BYTES - _MAX_COMMENT_BYTES))
            tail = file.read(_END_RECORD_BYTES + _MAX_COMMENT_BYTES)
    except OSError as error:
        raise NotThisFormat(f"{path.name}: {error.strerror}") from error
    if start[:2] != b"PK":
        raise NotThisFormat(f"{path.name}: not an npz archive")
    place = tail.rfind(_END_RECORD)
    if place < 0 or len(tail) - place < _END_RECORD_BYTES:
        raise _broken(path, "its end is missing; download it again")
    (directory_bytes,) = struct.unpack_from("<L", tail, place + 12)
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise _broken(
            path,
            f"its directory has {directory_bytes:,} bytes; "
            f"at most {_MAX_DIRECTORY_BYTES:,} are allowed",
        )


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype; numpy bounds the header and accepts only literals."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, descr = read(file)
    return shape, descr


def _entry(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NpzEntry:
    # Compressed zeros could expand a thousandfold; MLX and numpy.savez do not compress.
    if member.compress_type != zipfile.ZIP_STORED:
        raise _broken(path, f"{member.filename} is compressed")
    with archive.open(member) as file:
        try:
            shape, descr = _header(file)
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
            raise _broken(path, f"{member.filename} has no valid header") from error
        header_bytes = file.tell()
    if descr.hasobject:
        raise _broken(path, f"{member.filename} holds Python objects")
    dtype = _DTYPES.get(f"{descr.kind}{descr.itemsize}")
    if dtype is None or len(shape) > _MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise _broken(path, f"{member.filename} has the unsupported type {descr} or shape {shape}")
    nbytes = prod(shape) * descr.itemsize
    if header_bytes + nbytes != member.file_size or member.compress_size != member.file_size:
        raise _broken(path, f"the size of {member.filename} does not match its shape")
    return NpzEntry(dtype, shape, nbytes)


def _broken(path: Path, problem: str) -> BrokenModel:
    return BrokenModel(f"{path.name} is damaged: {problem[:300]}.", param="model")
