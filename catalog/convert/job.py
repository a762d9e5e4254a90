"""Describes one conversion step for its child process, with file helpers for all steps."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from core.errors import BrokenModel
from core.units import MIB, format_bytes

Report: TypeAlias = Callable[[float, str], None]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf")
_MAX_JSON_BYTES = 64 * MIB
# Keys by which a model folder names Python code to run.
_CODE_KEYS = ("auto_map", "model_file", "custom_pipelines")
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")
_REWRITTEN = ("config.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Job:
    """One step of a conversion.

    `files` are the source's files, weights first.  `output` is a folder to create, `work` an
    existing folder for temporary files.  `context_tokens` 0 means the trained length.
    """

    source_format: str
    target_format: str
    files: tuple[Path, ...]
    output: Path
    work: Path
    name: str
    quantization: str
    group_size: int = 64
    exporter: str = "auto"
    context_tokens: int = 0
    threads: int = 1

    @property
    def folder(self) -> Path:
        """The model's own folder: the uppermost one with files of it."""
        return min((file.parent for file in self.files), key=lambda path: len(path.parts))

    def to_json(self) -> str:
        """Return the job as one line of JSON."""
        fields = asdict(self)
        fields |= {"files": [str(file) for file in self.files]}
        fields |= {"output": str(self.output), "work": str(self.work)}
        return json.dumps(fields)

    @staticmethod
    def from_json(line: str) -> "Job":
        """Return the job that `to_json` wrote."""
        fields = json.loads(line)
        fields["files"] = tuple(Path(file) for file in fields["files"])
        return Job(**fields | {"output": Path(fields["output"]), "work": Path(fields["work"])})


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, at most 300 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, up to 64 MiB.  Raises BrokenModel."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise BrokenModel(
                f"{path.name} is {format_bytes(size)}; the limit is "
                f"{format_bytes(_MAX_JSON_BYTES)}.",
                param="model",
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenModel(
            f"The file {path.name} is missing; add it to the model's folder.", param="model"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BrokenModel(f"{path.name} is not valid JSON: {error}.", param="model") from None
    if not isinstance(value, dict):
        raise BrokenModel(f"{path.name} does not contain a JSON object.", param="model")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON object."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def with_legacy_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with transformers 5's `rope_parameters` copied to the older top-level keys.

    mlx-lm and older readers know only the top-level `rope_theta` and `rope_scaling`, and
    silently use defaults if they are missing.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    lifted = dict(config)

    def lift(key: str, value: object) -> None:
        # A null says no more than a missing key.
        if lifted.get(key) is None and value is not None:
            lifted[key] = value

    local = rope.get("sliding_attention")
    if isinstance(local, dict):
        lift("rope_local_base_freq", local.get("rope_theta"))
    full = rope.get("full_attention", rope)
    if not isinstance(full, dict):
        return config
    for key in _ROPE_KEYS:
        lift(key, full.get(key))
    if full.get("rope_type", full.get("type", "default")) != "default":
        lift("rope_scaling", {key: v for key, v in full.items() if key not in _ROPE_KEYS})
    return lifted


def link_source(job: Job) -> Path:
    """Return a folder with links to the model's own files, so that no other file is read.

    Configuration keys that name code to run are removed.
    """
    folder = job.work / "source"
    folder.mkdir()
    for file in job.files:
        if not file.is_relative_to(job.folder) or file.suffix == ".py":
            continue
        target = folder / file.relative_to(job.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.name in _REWRITTEN and file.parent == job.folder:
            config = {k: v for k, v in read_json(file).items() if k not in _CODE_KEYS}
            is_model = file.name == "config.json"
            write_json(target, with_legacy_rope_keys(config) if is_model else config)
        else:
            os.symlink(file.resolve(strict=True), target)
    card = job.folder / "README.md"
    if card.is_file() and not (folder / card.name).exists():
        # It names the license.
        os.symlink(card.resolve(), folder / card.name)
    return folder


def write_config(job: Job, dtype: str | None) -> None:
    """Write the source's config.json with the weights' new `dtype`; unchanged bytes if None.

    Keys that name code to run are removed.  Raises BrokenModel.
    """
    source, target = job.folder / "config.json", job.output / "config.json"
    config = read_json(source)
    kept = {key: value for key, value in config.items() if key not in _CODE_KEYS}
    if dtype is None and kept == config:
        shutil.copyfile(source, target)
        return
    if dtype is not None:
        set_dtype(kept, dtype)
    write_json(target, kept)


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the dtype of the weights in a configuration, and in those nested in it."""
    config["dtype"] = config["torch_dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict):
            for key in {"dtype", "torch_dtype"} & value.keys():
                value[key] = dtype


def weight_files(job: Job, suffixes: tuple[str, ...] = WEIGHTS) -> tuple[Path, ...]:
    """Return the job's weights.  Raises BrokenModel when there are none."""
    files = tuple(
        file for file in job.files if file.suffix in suffixes and file.parent == job.folder
    )
    if not files:
        raise BrokenModel(
            f"{job.name} has no weights; expected a file of type {', '.join(suffixes)}.",
            param="model",
        )
    return files
