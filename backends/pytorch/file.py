"""Identifies a PyTorch model from its files, without importing PyTorch."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from backends.base import ModelInfo
from backends.hf.adapters import refuse_adapter
from backends.hf.checks import check_folder, transformers_knows
from backends.hf.config import variant_files
from backends.hf.fit import TensorShape
from backends.hf.folder import (
    HfFolder,
    TensorEntry,
    folder_info,
    quantization_of,
    read_folder,
    weight_files,
)
from backends.hf.header import broken
from backends.hf.layout import WeightLayout, dense_tensors, weight_layout
from backends.hf.names import model_names
from backends.hf.quantization import refuse_unreadable
from backends.pytorch.unpickle import PickledTensor, Storage
from backends.pytorch.weights import SUFFIXES, TorchFile, read_shard, read_storage, read_torch_file
from core.errors import BrokenModel, NotThisFormat

_NOT_WEIGHTS = re.compile(
    r"(.*optimizer|.*scheduler|.*scaler|.*_optim_states|(bf16_|fp16_)?zero_pp_rank|training_args|"
    r"training_state|trainer_state|rng_state|random_states|sampler|dataloader|openvino)"
)
_DEEPSPEED = re.compile(r"mp_rank_\d+.*_model_states\.pt")


def pytorch_info(path: Path) -> ModelInfo:
    """Describe the model that `path` holds or is a shard of; see `Backend.identify`."""
    path = path.absolute()
    if path.suffix in SUFFIXES:
        refuse_adapter(path)
    if _NOT_WEIGHTS.match(path.name):
        raise NotThisFormat(f"{path.name} holds training state, not weights")
    if _DEEPSPEED.fullmatch(path.name):
        reason = "it is a part of DeepSpeed's training state; run zero_to_fp32.py beside it"
        raise broken(path, f"{reason}, and use the result")
    first = _read_beside_config(path)
    try:
        folder = read_folder(path.parent)
    except NotThisFormat:
        model_names(path, first.tensors)
        raise broken(
            path,
            "it has only weights; put the model's config.json and tokenizer.json beside it",
        ) from None
    if not folder.config.get("model_type"):
        raise NotThisFormat(f"{path.name} is part of another model")
    paths = _all_shards(folder, path)
    files = [first if each == path else read_shard(each) for each in paths]
    return torch_info(folder, files)


def _read_beside_config(path: Path) -> TorchFile:
    """Read a weight file; a quantization that cannot be read is the better reason to refuse it."""
    try:
        return read_torch_file(path)
    except BrokenModel:
        try:
            folder = read_folder(path.parent)
        except (BrokenModel, NotThisFormat):
            folder = None
        if folder is not None:
            refuse_unreadable(folder)
        raise


def _all_shards(folder: HfFolder, path: Path) -> tuple[Path, ...]:
    """Return all shards of the model of `path`; only itself for a single state dict."""
    if path.name.startswith("consolidated") and _has_usual_weights(folder.path):
        raise NotThisFormat(f"{path.name} is a copy of the weights beside it, in another layout")
    if not path.name.startswith("pytorch_model"):
        return (path,)
    shards = weight_files(folder.path, "bin")
    shards = shards if path in shards else variant_files(path)
    if path not in shards:
        raise NotThisFormat(f"{path.name} is not among the folder's weights")
    return shards


def torch_info(folder: HfFolder, files: Sequence[TorchFile]) -> ModelInfo:
    """Describe the model of these weight files in `folder`.  Raises BrokenModel."""
    stored, names, layout = _layout(folder, files)
    places = {name: index for index, file in enumerate(files) for name in file.tensors}
    plain = set(layout.plain)
    bytes_by_dtype: Counter[str] = Counter()
    for storage, own in _own_elements(places, {old: stored[old] for old in names}):
        bytes_by_dtype[storage.dtype.upper()] += own * storage.element_bytes
    unpacked = {old: stored[old] for old, new in names.items() if new in plain}
    parameters = sum(own for _, own in _own_elements(places, unpacked))
    check_folder(folder, is_known=transformers_knows(folder.model_type))
    return folder_info(
        "pytorch",
        folder,
        tuple(file.path for file in files),
        parameters=parameters + layout.packed_parameters,
        weights_bytes=sum(bytes_by_dtype.values()),
        quantization=layout.quantization or quantization_of(bytes_by_dtype),
    )


def torch_tensors(info: ModelInfo) -> dict[str, TensorShape]:
    """Return the model's tensors by its own names, unpacked.  Raises BrokenModel."""
    folder = read_folder(info.files[0].parent)
    files = [read_shard(path) for path in info.files if path.suffix in SUFFIXES]
    stored, names, layout = _layout(folder, files)
    entries = {new: _entry(stored[old]) for old, new in names.items()}
    return dense_tensors(layout, entries)


def _layout(
    folder: HfFolder, files: Sequence[TorchFile]
) -> tuple[dict[str, PickledTensor], Mapping[str, str], WeightLayout]:
    """Return the stored tensors, the names that the model gives them, and their layout."""
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    places = {name: file for file in files for name in file.tensors}
    names = model_names(files[0].path, stored)
    inverse = {new: old for old, new in names.items()}

    def read(name: str) -> bytes:
        old = inverse[name]
        return read_storage(places[old].path, stored[old].storage)

    entries = {new: _entry(stored[old]) for old, new in names.items()}
    can_read = all(file.is_zip for file in files)
    return stored, names, weight_layout(folder, entries, read if can_read else None)


def _entry(tensor: PickledTensor) -> TensorEntry:
    return TensorEntry(tensor.dtype.upper(), tensor.shape, tensor.nbytes)


def _own_elements(
    places: Mapping[str, int], tensors: Mapping[str, PickledTensor]
) -> list[tuple[Storage, int]]:
    """Return the elements of each storage that `tensors` view; `places` are their files.

    Tied weights view the same storage and count once.
    """
    viewed: Counter[tuple[int, Storage]] = Counter()
    for name, tensor in tensors.items():
        viewed[places[name], tensor.storage] += tensor.elements
    return [(storage, min(elements, storage.elements)) for (_, storage), elements in viewed.items()]


def _has_usual_weights(folder: Path) -> bool:
    """Whether there are weights of the usual names beside `consolidated` ones."""
    kinds: tuple[Literal["safetensors"], Literal["bin"]] = ("safetensors", "bin")
    found = (file for kind in kinds for file in weight_files(folder, kind))
    return any(not file.name.startswith("consolidated") for file in found)
