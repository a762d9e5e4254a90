"""Identifies an MLX model from its files, without importing MLX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from backends.base import ModelInfo
from backends.hf.checks import check_folder
from backends.hf.fit import TensorShape
from backends.hf.folder import (
    HfFolder,
    folder_info,
    is_mlx,
    quantization_of,
    read_folder,
    safetensors_header,
    tokenizer_files,
    weight_files,
)
from backends.hf.header import broken, count_bytes
from backends.hf.names import model_names
from backends.mlx.model import check_config, supports
from backends.mlx.npz import read_npz
from backends.mlx.quantization import mlx_weights
from core.errors import NotThisFormat
from core.files import visible_files


class _Entry(Protocol):
    """Description of one tensor in any file format; `dtype` is named as in safetensors."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def mlx_info(path: Path) -> ModelInfo:
    """Describe the model that the weights file `path` belongs to.

    Raises NotThisFormat; BrokenModel for damaged or malicious files and for architectures that
    mlx-lm does not support.
    """
    path = path.absolute()
    if path.suffix == ".npz":
        return _npz_info(path)
    if path.suffix != ".safetensors":
        raise NotThisFormat(f"{path.name} is neither safetensors nor npz")
    folder = read_folder(path.parent)
    files = weight_files(folder.path, "safetensors")
    if path not in files:
        raise NotThisFormat(f"{path.name} does not belong to the model beside it")
    first = safetensors_header(files[0])
    if not (first.metadata.get("format") == "mlx" or is_mlx(folder, first)):
        raise NotThisFormat(f"{path.name} was not made by MLX")
    tensors: dict[str, _Entry] = {}
    for file in files:
        tensors |= safetensors_header(file).tensors
    return _info(folder, files, tensors)


def mlx_tensors(info: ModelInfo) -> dict[str, TensorShape]:
    """Return the tensors of a described model by name.  Raises BrokenModel, NotThisFormat."""
    found: dict[str, TensorShape] = {}
    for path in info.files:
        entries: Mapping[str, _Entry] = {}
        if path.suffix == ".safetensors":
            entries = safetensors_header(path).tensors
        elif path.suffix == ".npz":
            entries = read_npz(path)
        found |= {name: TensorShape(each.dtype, each.shape) for name, each in entries.items()}
    return {new: found[old] for old, new in model_names(info.files[0], found).items()}


def _npz_info(path: Path) -> ModelInfo:
    tensors = read_npz(path)
    folder = read_folder(path.parent)
    if not tokenizer_files(folder.path):
        raise NotThisFormat(f"{path.name} has no tokenizer beside it")
    files = tuple(visible_files(folder.path, "weights*.npz")) or (path,)
    if path not in files:
        raise NotThisFormat(f"{path.name} does not belong to the model beside it")
    found: dict[str, _Entry] = {}
    for file in files:
        found |= tensors if file == path else read_npz(file)
    return _info(folder, files, found)


def _info(folder: HfFolder, files: tuple[Path, ...], tensors: Mapping[str, _Entry]) -> ModelInfo:
    config = folder.path / "config.json"
    check_config(folder.config)
    if not supports(folder.outer_type):
        name = repr(folder.outer_type[:60])
        raise broken(config, f"mlx-lm does not support the architecture {name}")
    check_folder(folder, is_known=True)
    tensors = {new: tensors[old] for old, new in model_names(files[0], tensors).items()}
    dtypes = count_bytes(tensors.values())
    weights = mlx_weights(config, folder.config, tensors)
    details: dict[str, int | float | str | bool] = {}
    if weights.main is not None:
        details = {"mlx_bits": weights.main.bits, "mlx_group_size": weights.main.group_size}
        details |= {"mlx_keeps_packed": True} if weights.keeps_packed else {}
    info = folder_info(
        "mlx",
        folder,
        files,
        parameters=weights.parameters,
        weights_bytes=sum(dtypes.values()),
        quantization=weights.label or quantization_of(dtypes),
        details=details,
    )
    if int(info.details["n_layer"]) > len(tensors):
        raise broken(
            config,
            f"it declares {info.details['n_layer']} layers, but the weights have only "
            f"{len(tensors)} tensors",
        )
    return info
