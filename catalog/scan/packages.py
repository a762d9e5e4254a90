"""Tells which files belong to one model, by their names and the files around them."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

# A folder with one of these is one model, with all that is in it.
_WHOLE_FOLDERS = ("model_index.json", "saved_model.pb")
_WHOLE_SUFFIXES = (".mlpackage", ".mlmodelc")
# A folder with one of these describes the weights in it.
_DESCRIPTIONS = (
    "config.json", "genai_config.json", "params.json", "modules.json", "tokenizer_config.json",
    "tokenizer.json", "trainer_state.json", "latest", "model_config.yaml",
)  # fmt: skip
# Subfolders of a model's folder that hold other files of the same model.
_INNER = re.compile(
    r"onnx|openvino|coreml|original|tf|flax|variables|gguf|\d+_[A-Z]\w*|global_step\d+|"
    r"pytorch_model_fsdp_\d+|optimizer_\d+|mp_rank_\d+|iter_\d+|distcp|model",
)
_MAX_RISE = 3
_MAX_WHOLE = 4
_SHARD = re.compile(r"(.+?)[-._]\d{5}-of-\d{5}(\.\w+)", re.DOTALL)
_EXTERNAL_DATA = re.compile(r"(.+?)(?:\.onnx)?[._](?:onnx_)?data(?:_\d+)?", re.DOTALL)
_ADAPTER = re.compile(r"adapter|pytorch_lora_weights", re.IGNORECASE)
# Files that training leaves beside a model's weights.
_TRAINING_STATE = re.compile(
    r"optim|scheduler|rng_state|random_states|training_args|scaler\.pt|loss|zero_pp_rank|"
    r".*optim_states|.*\.distcp",
)
# ONNX graphs that are halves of a model.
_HALVES = re.compile(
    r"(decoder_model|decoder_with_past_model|encoder_model|embed_tokens|vision_encoder|"
    r"audio_encoder|text_model|vision_model|encoder|decoder|unet|vae)(?:[-._][-.\w]*)?\.onnx"
)
_NATURAL_FORMATS = {
    ".gguf": "gguf", ".ggml": "gguf", ".safetensors": "safetensors", ".npz": "mlx",
    ".bin": "pytorch", ".pt": "pytorch", ".pth": "pytorch", ".ckpt": "pytorch", ".onnx": "onnx",
    ".ort": "onnx", ".mlmodel": "coreml", ".mlpackage": "coreml", ".mlmodelc": "coreml",
}  # fmt: skip


@dataclass(slots=True)
class Packages:
    """Finds the package of a file; remembers what it saw of the folders.

    A package is a folder, or the name of a file without its shard number: everything in it is
    refused once, with one reason.
    """

    _described: dict[Path, bool] = field(default_factory=dict)
    _whole: dict[Path, bool] = field(default_factory=dict)

    def of(self, path: Path, root: Path) -> Path:
        """Return the package of `path`, which is in the model folder `root`."""
        whole = self.whole_folder(path, root)
        if whole is not None:
            return whole
        if natural_format(path) == "gguf":
            return model_stem(path)
        if _ADAPTER.match(path.name):
            return path.with_name("adapter")
        folder = path.parent
        for _ in range(_MAX_RISE):
            if self._is_described(folder):
                return folder
            if folder == root or not _INNER.fullmatch(folder.name):
                break
            folder = folder.parent
        return model_stem(path)

    def whole_folder(self, path: Path, root: Path | None = None) -> Path | None:
        """Return the outermost folder around `path` that is one model with all that is in it.

        Looks at up to four folders around the file, and none outside of `root`.
        """
        found = None
        for folder in list(path.parents)[:_MAX_WHOLE]:
            if self._is_whole(folder):
                found = folder
            if folder == root:
                break
        return found

    def _is_described(self, folder: Path) -> bool:
        known = self._described.get(folder)
        if known is None:
            known = self._described[folder] = _has_any(folder, _DESCRIPTIONS)
        return known

    def _is_whole(self, folder: Path) -> bool:
        known = self._whole.get(folder)
        if known is None:
            is_named = folder.suffix.lower() in _WHOLE_SUFFIXES
            known = self._whole[folder] = is_named or _has_any(folder, _WHOLE_FOLDERS)
        return known


def natural_format(path: Path) -> str:
    """Return the format that the file's name promises; empty if it promises none."""
    return _NATURAL_FORMATS.get(path.suffix.lower(), "")


def is_part(path: Path) -> bool:
    """Whether a file is never a model by itself: training state, external data, half a graph."""
    name = path.name
    is_data = path.suffix.lower() not in _NATURAL_FORMATS and _EXTERNAL_DATA.fullmatch(name)
    return bool(_TRAINING_STATE.match(name) or _HALVES.fullmatch(name) or is_data)


def is_training_state(path: Path) -> bool:
    """Whether training wrote the file to continue later."""
    return _TRAINING_STATE.match(path.name) is not None


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any(os.path.isfile(folder / name) for name in names)


def model_stem(path: Path) -> Path:
    """Return the path without shard number; external data and graph give the same."""
    match = _SHARD.fullmatch(path.name)
    if match is not None:
        return path.with_name(match[1] + match[2])
    if path.suffix.lower() == ".bin" and path.with_suffix(".xml").is_file():
        return path.with_suffix(".xml")
    data = _EXTERNAL_DATA.fullmatch(path.name)
    if data is not None and natural_format(path) == "":
        return path.with_name(f"{data[1]}.onnx")
    return path
