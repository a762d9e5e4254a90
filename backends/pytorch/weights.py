"""Reads PyTorch weight files without PyTorch, and loads their tensors with it."""

import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from backends.base import ModelInfo
from backends.hf.checks import check_folder, transformers_knows
from backends.hf.folder import HfFolder, folder_info, quantization_of, read_folder, weight_files
from backends.hf.header import broken
from backends.pytorch.unpickle import (
    MAX_PICKLE_BYTES,
    PickledTensor,
    Storage,
    UnsafePickle,
    read_pickle,
)
from core.errors import BrokenModel, NotThisFormat
from core.units import MIB

SUFFIXES = frozenset({".bin", ".pt", ".pth"})
_ZIP_MAGIC = b"PK\x03\x04"
# Pickle protocol 2, then torch's magic number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LFS_POINTER = b"version https://git-lfs"
_MAX_DIRECTORY_BYTES = 64 * MIB
_NOT_WEIGHTS = re.compile(
    r"(adapter|optimizer|scheduler|scaler|training_args|rng_state|random_states|openvino)"
)
# Keys under which training scripts put the state dict.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
_SAFETENSORS_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "f64": "F64", "i8": "I8"}


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


def pytorch_info(path: Path) -> ModelInfo:
    """Describe the model that `path` holds or is a shard of; see `Backend.identify`."""
    path = path.absolute()
    if _NOT_WEIGHTS.match(path.name):
        raise NotThisFormat(f"{path.name} holds training state, not weights")
    first = read_torch_file(path)
    try:
        folder = read_folder(path.parent)
    except NotThisFormat:
        raise broken(
            path,
            "it has only weights; put the model's config.json and tokenizer.json beside it",
        ) from None
    if not folder.config.get("model_type"):
        raise NotThisFormat(f"{path.name} is part of another model")
    paths = _all_shards(folder, path)
    files = [first if each == path else _shard(each) for each in paths]
    return torch_info(folder, files)


def _all_shards(folder: HfFolder, path: Path) -> tuple[Path, ...]:
    """Return all shards of the model of `path`; only itself for a single state dict."""
    if not path.name.startswith("pytorch_model"):
        return (path,)
    shards = weight_files(folder.path, "bin")
    if path not in shards:
        raise NotThisFormat(f"{path.name} is not among the folder's weights")
    return shards


def _shard(path: Path) -> TorchFile:
    try:
        return read_torch_file(path)
    except NotThisFormat:
        raise broken(path, "it is not a PyTorch file, though the index lists it") from None


def torch_info(folder: HfFolder, files: Sequence[TorchFile]) -> ModelInfo:
    """Describe the model of these weight files in `folder`.  Raises BrokenModel."""
    bytes_by_dtype: Counter[str] = Counter()
    parameters = 0
    for file in files:
        viewed: Counter[Storage] = Counter()
        for tensor in file.tensors.values():
            viewed[tensor.storage] += tensor.elements
        for storage, elements in viewed.items():
            # Tied weights view the same storage and count once.
            own = min(elements, storage.elements)
            name = _SAFETENSORS_NAMES.get(storage.dtype, storage.dtype.upper())
            bytes_by_dtype[name] += own * storage.element_bytes
            parameters += own
    refuse_quantized(folder)
    check_folder(folder, is_known=transformers_knows(folder.model_type))
    return folder_info(
        "pytorch",
        folder,
        tuple(file.path for file in files),
        parameters=parameters,
        weights_bytes=sum(bytes_by_dtype.values()),
        quantization=quantization_of(folder, bytes_by_dtype),
    )


def refuse_quantized(folder: HfFolder) -> None:
    """Raise BrokenModel for weights that need another library to dequantize."""
    config = folder.config.get("quantization_config")
    if config:
        method = config.get("quant_method") if isinstance(config, dict) else None
        raise BrokenModel(
            f"The model's weights are quantized ({str(method)[:40]}) for another runtime; use the "
            "unquantized ones, or MLX or GGUF.",
            param="model",
        )


def load_tensors(paths: Sequence[Path]) -> dict[str, Any]:
    """Return all tensors of these files, memory-mapped if the layout allows it.

    `paths` are all safetensors or all PyTorch files.  Raises BrokenModel.
    """
    tensors: dict[str, Any] = {}
    for path in paths:
        tensors |= _torch_tensors(path) if path.suffix in SUFFIXES else _safetensors(path)
    return tensors


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

    file = _shard(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=file.is_zip)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as problem:
        raise broken(path, f"PyTorch cannot read it ({problem})") from problem
    values = loaded[file.wrapper] if file.wrapper else loaded
    return {name: values[name] for name in file.tensors}
