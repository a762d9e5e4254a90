"""Reads PyTorch weight files without PyTorch, and loads their tensors with it."""

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from backends.hf.header import broken
from backends.hf.names import model_names
from backends.pytorch.unpickle import (
    MAX_PICKLE_BYTES,
    PickledTensor,
    Storage,
    UnsafePickle,
    read_pickle,
)
from core.errors import NotThisFormat
from core.units import MIB

SUFFIXES = frozenset({".bin", ".pt", ".pth"})
_ZIP_MAGIC = b"PK\x03\x04"
# Pickle protocol 2, then torch's magic number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LFS_POINTER = b"version https://git-lfs"
_MAX_DIRECTORY_BYTES = 64 * MIB
# Keys under which training scripts put the state dict; averaged copies only if there is no other.
_WRAPPERS = (
    "state_dict", "model", "model_state_dict", "model_state", "module", "net", "network",
    "weights", "params", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TorchFile:
    """One weight file; `wrapper` is the key of its state dict, empty at the top level."""

    path: Path
    is_zip: bool
    wrapper: str
    tensors: Mapping[str, PickledTensor]


class _BoundedFile:
    """A file for zipfile that refuses to read more than a directory's size at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory is too large")
        data = self._file.read(_MAX_DIRECTORY_BYTES + 1 if count < 0 else count)
        if len(data) > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory is too large")
        return data


def read_torch_file(path: Path) -> TorchFile:
    """Read the names, types and shapes of a weight file; runs and imports nothing from it.

    Raises NotThisFormat for other files, BrokenModel for damaged ones and for pickles that use
    more than tensors need.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        raise NotThisFormat(f"{path.name} is not a PyTorch file")
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY_MAGIC) + len(_LFS_POINTER))
            if start.startswith(_LFS_POINTER):
                raise broken(path, "it is a Git LFS pointer; its content was not downloaded")
            is_zip = start.startswith(_ZIP_MAGIC)
            if not is_zip and not start.startswith(_LEGACY_MAGIC):
                raise NotThisFormat(f"{path.name} is not a PyTorch file")
            root = _zip_root(file, path) if is_zip else _legacy_root(file, path)
    except UnsafePickle as problem:
        raise broken(path, str(problem)) from problem
    except OSError as problem:
        raise broken(path, f"it cannot be read ({problem.strerror})") from problem
    wrapper, tensors = _state_dict(root)
    if not tensors:
        raise NotThisFormat(f"{path.name} has no state dict")
    return TorchFile(path, is_zip, wrapper, tensors)


def _zip_root(file: IO[bytes], path: Path) -> Any:
    """Return the pickled value of a zip archive `<name>/data.pkl`, `<name>/data/<storage>`."""
    try:
        with zipfile.ZipFile(_BoundedFile(file)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            names = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
            if not names:
                raise NotThisFormat(f"{path.name} is a zip archive, but not of PyTorch")
            prefix = names[0].removesuffix("data.pkl")
            if len(names) > 1 or len(entries) != len(archive.infolist()):
                raise broken(path, "its archive has several files of the same name")
            if f"{prefix}constants.pkl" in entries:
                raise broken(path, "it is a TorchScript program; save the state dict instead")
            entry = entries[names[0]]
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MAX_PICKLE_BYTES:
                raise broken(path, "its pickle is compressed or too large")
            root, _ = read_pickle(archive.read(entry))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as problem:
        raise broken(path, f"its archive is damaged ({problem})") from problem
    for storage in _storages(root):
        data = entries.get(f"{prefix}data/{storage.key}")
        needed = storage.elements * storage.element_bytes
        if data is None or data.file_size < needed or data.compress_type != zipfile.ZIP_STORED:
            raise broken(
                path,
                f"the storage {storage.key[:40]!r} in it is missing or cut off; download it again",
            )
    return root


def _legacy_root(file: IO[bytes], path: Path) -> Any:
    """Return the value of a file in the pre-zip layout: four pickles, then the storages."""
    size = file.seek(0, 2)
    file.seek(0)
    data = file.read(MAX_PICKLE_BYTES)
    position, root = 0, None
    for index in range(4):
        value, position = read_pickle(data, position)
        root = value if index == 3 else root
    if sum(each.elements * each.element_bytes for each in _storages(root)) > size - position:
        raise broken(path, "it ends before its tensors do; download it again")
    return root


def _storages(value: Any, depth: int = 0) -> list[Storage]:
    """Return the storages of all tensors in a state dict, wrapped or not."""
    if isinstance(value, PickledTensor):
        return [value.storage]
    if not isinstance(value, dict) or depth > 1:
        return []
    found = {s.key: s for each in value.values() for s in _storages(each, depth + 1)}
    return list(found.values())


def _state_dict(root: Any) -> tuple[str, dict[str, PickledTensor]]:
    """Return the wrapper's key and the tensors of the state dict; no tensors if there is none."""
    if not isinstance(root, dict):
        return "", {}
    for key in _WRAPPERS:
        found = _tensors(root.get(key))
        if found:
            return key, found
    return "", _tensors(root)


def _tensors(value: Any) -> dict[str, PickledTensor]:
    if not isinstance(value, dict):
        return {}
    return {
        name: tensor
        for name, tensor in value.items()
        if isinstance(name, str) and isinstance(tensor, PickledTensor)
    }


def read_storage(path: Path, storage: Storage) -> bytes:
    """Return the content of a small storage in a zip archive.  Raises BrokenModel."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_BoundedFile(file)) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            entry = archive.getinfo(f"{names[0].removesuffix('data.pkl')}data/{storage.key}")
            if entry.file_size > _MAX_DIRECTORY_BYTES:
                raise broken(path, f"the storage {storage.key[:40]!r} in it is too large")
            return archive.read(entry)[: storage.elements * storage.element_bytes]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, LookupError, OSError) as problem:
        raise broken(path, f"its archive is damaged ({problem})") from problem


def read_shard(path: Path) -> TorchFile:
    """Read a weight file that must be one.  Raises BrokenModel."""
    try:
        return read_torch_file(path)
    except NotThisFormat:
        raise broken(path, "it is not a PyTorch file, though the index lists it") from None


def load_tensors(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the weights in these files by the model's names, memory-mapped where possible.

    `paths` are all safetensors or all PyTorch files.  Raises BrokenModel.
    """
    tensors: dict[str, Any] = {}
    for path in paths:
        tensors |= _torch_tensors(path) if path.suffix in SUFFIXES else _safetensors(path)
    return {new: tensors[old] for old, new in model_names(paths[0], tensors).items()}


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise broken(path, f"safetensors cannot read it ({problem})") from problem


def _torch_tensors(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    file = read_shard(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=file.is_zip)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as problem:
        raise broken(path, f"PyTorch cannot read it ({problem})") from problem
    values = loaded[file.wrapper] if file.wrapper else loaded
    return {name: values[name] for name in file.tensors}
