"""Converts PyTorch checkpoints to safetensors; never runs code in a pickle."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from catalog.convert.graph import ORIGINAL
from catalog.convert.job import (
    Job,
    Report,
    copy_sidecars,
    link_source,
    read_json,
    weight_files,
    write_json,
)
from catalog.convert.steps.from_gguf import DTYPES
from core.errors import BrokenModel

_SHARD_BYTES = 4 * 10**9
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")
_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


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
            name = key
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            tensors[name] = value
    if not tensors:
        raise BrokenModel(f"{path.name} does not contain any tensors.", param="model")
    return tensors


def _all_tensors(files: tuple[Path, ...], report: Report) -> Iterator[tuple[str, Any]]:
    """Yield every tensor of every shard; one shard is open at a time."""
    from safetensors import safe_open

    for number, file in enumerate(files):
        report(number / len(files), f"converting {file.name}")
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118
                    yield name, shard.get_tensor(name)
        else:
            yield from load_checkpoint(file).items()


class ShardWriter:
    """Writes tensors as safetensors shards of bounded size, with an index if several."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Any] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total_bytes = 0

    def add(self, name: str, tensor: Any) -> None:
        """Add a tensor; writes a shard when it is full.  Raises BrokenModel for a repeated name."""
        if name in self._names:
            raise BrokenModel(f"The weights contain the tensor {name!r} twice.", param="model")
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > _SHARD_BYTES:
            self._flush()
        # A copy: safetensors refuses tensors that share memory.
        self._pending[name] = tensor.detach().contiguous().clone()
        self._pending_bytes += size
        self._total_bytes += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self._folder / f"part-{len(self._shards)}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write the last shard and give all shards their final names."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            final = "model.safetensors" if count == 1 else final
            (self._folder / f"part-{index}.safetensors").rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index_json = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self._folder / "model.safetensors.index.json", index_json)


def to_safetensors(job: Job, report: Report) -> None:
    """Write a folder with the same tensors as safetensors, cast if the job asks for that.

    A tied output layer is omitted, as in transformers.  Raises BrokenModel.
    """
    import torch

    torch.set_num_threads(job.threads)
    files = weight_files(job, _SUFFIXES)
    folder = link_source(job)
    config = read_json(folder / "config.json")
    dtype = None if job.quantization == ORIGINAL else getattr(torch, DTYPES[job.quantization])
    is_tied = config.get("tie_word_embeddings", False) is True
    writer = ShardWriter(job.output)
    for name, tensor in _all_tensors(files, report):
        if is_tied and name == "lm_head.weight":
            continue
        casts = dtype is not None and tensor.is_floating_point()
        writer.add(name, tensor.to(dtype) if casts else tensor)
    writer.close()
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = DTYPES[job.quantization]
    write_json(job.output / "config.json", config)
    copy_sidecars(folder, job.output)
    report(1.0, "done")
