"""Converts PyTorch checkpoints and safetensors to safetensors, cast if that is wanted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from catalog.convert.graph import ORIGINAL
from catalog.convert.job import Job, Report, read_json, weight_files, write_config
from catalog.convert.sidecars import copy_sidecars
from catalog.convert.steps.dtypes import DTYPES, SAFETENSORS_DTYPES, raw_bytes
from catalog.convert.steps.number_check import cast_checked
from catalog.convert.steps.torch_files import (
    SUFFIXES,
    StoredTensor,
    listed_tensors,
    tensor_rows,
)
from catalog.convert.tensor_file import LazyTensor, write_tensors

_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def lazy_tensors(files: Sequence[Path], dtype: str | None) -> Iterator[LazyTensor]:
    """Yield all tensors of safetensors files and checkpoints, floating ones cast to `dtype`.

    `dtype` is PyTorch's name, None to keep each.  Raises BrokenModel.
    """
    import torch

    wanted = None if dtype is None else getattr(torch, dtype)
    short = {name: key for key, name in SAFETENSORS_DTYPES.items()}
    for tensor in listed_tensors(files):
        casts = dtype is not None and tensor.dtype in _FLOATING
        target = short[dtype] if casts and dtype is not None else tensor.dtype

        def pieces(tensor: StoredTensor = tensor, casts: bool = casts) -> Iterator[Any]:
            for rows in tensor_rows(tensor):
                yield raw_bytes(cast_checked(tensor.name, rows, wanted) if casts else rows)

        yield LazyTensor(tensor.name, target, tensor.shape, pieces)


def _without_tied(tensors: list[LazyTensor]) -> list[LazyTensor]:
    """Omit an output layer that is the same as the embeddings, as transformers does."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    head = shapes.get(_HEAD)
    has_embeddings = any(
        shape == head and name.endswith(_EMBEDDINGS) for name, shape in shapes.items()
    )
    return [tensor for tensor in tensors if tensor.name != _HEAD or not has_embeddings]


def to_safetensors(job: Job, report: Report) -> None:
    """Write a folder with the same tensors as safetensors, cast if the job asks for that.

    A tied output layer is omitted, as in transformers.  Raises BrokenModel, RequestError for
    weights that the wanted type cannot hold.
    """
    import torch

    torch.set_num_threads(job.threads)
    files = weight_files(job, SUFFIXES)
    config = read_json(job.folder / "config.json")
    dtype = None if job.quantization == ORIGINAL else DTYPES[job.quantization]
    report(0.0, "reading the weights")
    tensors = list(lazy_tensors(files, dtype))
    if config.get("tie_word_embeddings", False) is True:
        tensors = _without_tied(tensors)
    write_tensors(
        job.output,
        tensors,
        metadata={"format": "pt"},
        on_progress=lambda share: report(share, "writing the weights"),
    )
    copy_sidecars(job.folder, job.output)
    write_config(job, dtype)
    report(1.0, "done")
