"""Reads the tensors of safetensors files and PyTorch checkpoints; never runs code in a pickle."""

import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from catalog.convert.steps.dtypes import SAFETENSORS_DTYPES
from catalog.convert.tensor_file import rows_at_once
from core.errors import BrokenModel

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")
SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


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
    return f"{path.name} cannot be read: {str(error).splitlines()[0][:300]}"


def _plain_name(name: str) -> str:
    """Return a tensor's name without what distributed training and compilation put before it."""
    while name.startswith(_PREFIXES):
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
    return name


def _tensors(path: Path, loaded: object) -> dict[str, Any]:
    """Return the tensors of a checkpoint, unwrapped from the dicts that trainers add."""
    import torch

    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise BrokenModel(f"{path.name} does not contain a state dict.", param="model")
    tensors: dict[str, Any] = {}
    for key, value in loaded.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[_plain_name(key)] = value
    if not tensors:
        raise BrokenModel(f"{path.name} does not contain any tensors.", param="model")
    return tensors


@lru_cache(maxsize=1)
def _opened(path: Path) -> Any:
    """Return a file's tensors by name; only the last file stays open.  Raises BrokenModel."""
    from safetensors import safe_open

    return safe_open(path, "pt") if path.suffix == ".safetensors" else load_checkpoint(path)


def close_files() -> None:
    """Close the file that is still open."""
    _opened.cache_clear()


def listed_tensors(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the name, safetensors dtype and shape of each tensor in a file."""
    import torch

    dtypes = {getattr(torch, name): short for short, name in SAFETENSORS_DTYPES.items()}
    opened = _opened(file)
    for name in opened.keys():  # noqa: SIM118
        if file.suffix == ".safetensors":
            part = opened.get_slice(name)
            yield name, part.get_dtype(), tuple(part.get_shape())
            continue
        tensor = opened[name]
        if tensor.dtype not in dtypes:
            raise BrokenModel(
                f"The tensor {name!r} has the type {tensor.dtype}, which cannot be converted.",
                param="model",
            )
        yield name, dtypes[tensor.dtype], tuple(tensor.shape)


def tensor_rows(
    file: Path, name: str, shape: tuple[int, ...], *, multiple: int = 1
) -> Iterator[Any]:
    """Yield a tensor in pieces of some rows, always a multiple of `multiple`."""
    opened = _opened(file)
    is_sliced = file.suffix == ".safetensors"
    if not shape:
        yield opened.get_tensor(name) if is_sliced else opened[name]
        return
    whole = opened.get_slice(name) if is_sliced else opened[name].detach()
    count = max(1, rows_at_once(shape) // multiple) * multiple
    for start in range(0, shape[0], count):
        yield whole[start : start + count]
