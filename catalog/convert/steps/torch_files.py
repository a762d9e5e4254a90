"""Reads the tensors of safetensors files and PyTorch checkpoints; never runs code in a pickle."""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from backends.hf.names import model_names
from backends.pytorch.weights import read_torch_file
from catalog.convert.job import first_line
from catalog.convert.steps.dtypes import SAFETENSORS_DTYPES
from catalog.convert.tensor_file import rows_at_once
from core.errors import BrokenModel, NotThisFormat

SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, under the name `stored` there; `name` is the one that the model gives it.

    `dtype` is the name in safetensors.
    """

    file: Path
    stored: str
    name: str
    dtype: str
    shape: tuple[int, ...]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's tensors by name, memory-mapped if the file allows it.

    Raises BrokenModel for damaged files, for pickles of anything but tensors, and for compressed
    archives, whose size in memory is not bounded.
    """
    import torch

    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise BrokenModel(
                    f"{path.name} is a compressed archive; only uncompressed checkpoints are read.",
                    param="model",
                )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:
        raise BrokenModel(_unreadable(path, error), param="model") from error
    return _tensors(path, loaded)


def _unreadable(path: Path, error: Exception) -> str:
    """Return why a checkpoint cannot be read; names the code that it would run."""
    import torch

    wanted: list[str] = []
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        # The archive itself is damaged.
        wanted = []
    if wanted:
        return f"{path.name} is refused: its pickle would run {', '.join(sorted(wanted)[:5])}."
    return f"{path.name} cannot be read: {first_line(error)}"


def _tensors(path: Path, loaded: Any) -> dict[str, Any]:
    """Return the tensors of the state dict in a checkpoint, which is found as a scan finds it."""
    try:
        file = read_torch_file(path)
    except NotThisFormat as error:
        raise BrokenModel(f"{path.name} does not contain any tensors.", param="model") from error
    values = loaded[file.wrapper] if file.wrapper else loaded
    return {name: values[name] for name in file.tensors}


@lru_cache(maxsize=1)
def _opened(path: Path) -> Any:
    """Return a file's tensors by name; only the last file stays open.  Raises BrokenModel."""
    from safetensors import safe_open

    return safe_open(path, "pt") if path.suffix == ".safetensors" else load_checkpoint(path)


def close_files() -> None:
    """Close the file that is still open."""
    _opened.cache_clear()


def listed_tensors(files: Sequence[Path]) -> Iterator[StoredTensor]:
    """Yield the model's tensors in its weight files, without what belongs to training only.

    Raises BrokenModel.
    """
    listed = [each for file in files for each in _file_tensors(file)]
    names = model_names(files[0], [stored for _, stored, _, _ in listed])
    for file, stored, dtype, shape in listed:
        if stored in names:
            yield StoredTensor(file, stored, names[stored], dtype, shape)


def _file_tensors(file: Path) -> Iterator[tuple[Path, str, str, tuple[int, ...]]]:
    """Yield each tensor in a file: the file, its name there, safetensors dtype and shape."""
    import torch

    dtypes = {getattr(torch, name): short for short, name in SAFETENSORS_DTYPES.items()}
    opened = _opened(file)
    for name in opened.keys():  # noqa: SIM118
        if file.suffix == ".safetensors":
            part = opened.get_slice(name)
            yield file, name, part.get_dtype(), tuple(part.get_shape())
            continue
        tensor = opened[name]
        if tensor.dtype not in dtypes:
            raise BrokenModel(
                f"The tensor {name!r} has the type {tensor.dtype}, which cannot be converted.",
                param="model",
            )
        yield file, name, dtypes[tensor.dtype], tuple(tensor.shape)


def tensor_rows(tensor: StoredTensor, *, multiple: int = 1) -> Iterator[Any]:
    """Yield a tensor in pieces of some rows, always a multiple of `multiple`."""
    opened = _opened(tensor.file)
    is_sliced = tensor.file.suffix == ".safetensors"
    if not tensor.shape:
        yield opened.get_tensor(tensor.stored) if is_sliced else opened[tensor.stored]
        return
    whole = opened.get_slice(tensor.stored) if is_sliced else opened[tensor.stored].detach()
    count = rows_at_once(tensor.shape, multiple)
    for start in range(0, tensor.shape[0], count):
        yield whole[start : start + count]
