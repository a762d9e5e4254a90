"""Prepares a model's folder so that transformers maps its weights from disk.

transformers copies every tensor whose type is not the one that it is told to load: private memory,
while a mapped file's pages are dropped when memory is short.
"""

from pathlib import Path

from catalog.convert.job import Job, read_json, set_dtype, weight_files, write_json
from catalog.convert.steps.dtypes import SAFETENSORS_DTYPES
from catalog.convert.steps.to_safetensors import lazy_tensors
from catalog.convert.steps.torch_files import close_files, listed_tensors
from catalog.convert.tensor_file import write_tensors
from core.files import visible_files

_MAPPED = frozenset({"F32", "F16", "BF16"})
_FLOATING = _MAPPED | {"F64"}


def map_weights(job: Job, source: Path, *, in_f32: bool) -> None:
    """Make one type of all weights in `source`, a folder with links, and of its config.json.

    Weights of several types, and all others than f32 if `in_f32`, are copied to f32 in the
    folder, piece by piece; their names become those that the model gives them.  Blocks; raises
    BrokenModel.
    """
    files = weight_files(job, (".safetensors",))
    listed = list(listed_tensors(files))
    kinds = {tensor.dtype for tensor in listed} & _FLOATING
    is_plain = len(kinds) == 1 and all(tensor.stored == tensor.name for tensor in listed)
    if is_plain and kinds <= ({"F32"} if in_f32 else _MAPPED):
        dtype = SAFETENSORS_DTYPES[kinds.pop()]
    else:
        dtype = "float32"
        for pattern in ("*.safetensors", "*.safetensors.index.json"):
            for path in visible_files(source, pattern):
                path.unlink()
        write_tensors(
            source,
            lazy_tensors(files, dtype),
            metadata={"format": "pt"},
            on_progress=lambda _share: None,
        )
    close_files()
    config = read_json(source / "config.json")
    if config.get("dtype", config.get("torch_dtype")) != dtype:
        set_dtype(config, dtype)
        write_json(source / "config.json", config)
