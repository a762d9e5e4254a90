"""Says of a file that no backend recognizes what it is, if it looks like a model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backends.hf.header import (
    SafetensorsHeader,
    read_bytes,
    read_json,
    read_optional_json,
    safetensors_header,
)
from backends.hf.kinds.other import SERVED, other_kind
from catalog.scan.packages import is_training_state, natural_format
from core.errors import ImpetusError, NotThisFormat

_START_BYTES = 512
_CONFIGS = ("model_index.json", "config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class OtherFormat:
    """A format that no backend reads: its label in ids, what it is, and what to do instead."""

    format: str
    words: str
    advice: str


_FROM_HUB = "download the model as safetensors or GGUF"
_OLD_GGML = OtherFormat(
    "ggml", "a GGML file, older than GGUF or for whisper.cpp", "download the model as GGUF"
)
_LITERT = OtherFormat("tflite", "a LiteRT (TensorFlow Lite) model", _FROM_HUB)
_KERAS = OtherFormat("keras", "a Keras or TensorFlow model", _FROM_HUB)
_ORT = OtherFormat("onnx", "an ONNX model in onnxruntime's own format", "use the .onnx file")
_LLAMAFILE = OtherFormat(
    "llamafile", "a llamafile, a program with a model in it", "download the model as GGUF"
)
_TENSORRT = OtherFormat("tensorrt", "a TensorRT engine, for NVIDIA processors", _FROM_HUB)
_EXECUTORCH = OtherFormat("executorch", "an ExecuTorch program", _FROM_HUB)
_PADDLE = OtherFormat("paddle", "a PaddlePaddle model", _FROM_HUB)
_NEMO = OtherFormat("nemo", "a NeMo archive", _FROM_HUB)

_SUFFIXES: Mapping[str, OtherFormat] = {
    ".ggml": _OLD_GGML, ".ggjt": _OLD_GGML, ".h5": _KERAS, ".hdf5": _KERAS, ".keras": _KERAS,
    ".pb": OtherFormat("tensorflow", "a TensorFlow graph", _FROM_HUB),
    ".tflite": _LITERT, ".task": _LITERT, ".litertlm": _LITERT,
    ".msgpack": OtherFormat("flax", "a Flax model", _FROM_HUB),
    ".ot": OtherFormat("rust", "a model for rust-bert", _FROM_HUB),
    ".ort": _ORT, ".engine": _TENSORRT, ".plan": _TENSORRT, ".trt": _TENSORRT,
    ".nemo": _NEMO, ".pdmodel": _PADDLE, ".pdiparams": _PADDLE, ".pdparams": _PADDLE,
    ".mnn": OtherFormat("mnn", "an MNN model", _FROM_HUB),
    ".llamafile": _LLAMAFILE, ".pte": _EXECUTORCH,
    ".distcp": OtherFormat(
        "pytorch", "a part of a distributed PyTorch checkpoint", "save it as safetensors"
    ),
    ".dlc": OtherFormat("qnn", "a model for Qualcomm processors", _FROM_HUB),
    ".rknn": OtherFormat("rknn", "a model for Rockchip processors", _FROM_HUB),
}  # fmt: skip
# Offset, bytes: the format.
_MAGIC: tuple[tuple[int, bytes, OtherFormat], ...] = (
    (0, b"lmgg", _OLD_GGML), (0, b"tjgg", _OLD_GGML), (0, b"fmgg", _OLD_GGML),
    (0, b"algg", _OLD_GGML), (0, b"\x89HDF\r\n\x1a\n", _KERAS), (4, b"TFL3", _LITERT),
    (4, b"ORTM", _ORT), (0, b"MZqFpD", _LLAMAFILE), (0, b"ftrt", _TENSORRT),
    (4, b"ET12", _EXECUTORCH),
)  # fmt: skip
_GGUF = b"GGUF"
_LFS_POINTER = b"version https://git-lfs"
_TEXTS = (b"<!doctype", b"<html", b"<?xml", b"{", b"version ", b"<error")
_ZIP = b"PK\x03\x04"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_HEADER_START = re.compile(rb".{6}\0\0\{\s*\"", re.DOTALL)
# `.bin` says little: without a known content only these names promise a model.
_BIN_NAMES = re.compile(r"(pytorch_model|model|consolidated|adapter_model|ggml|openvino_model)")
_PREFIXES = (
    ("model.diffusion_model.", "an image generator's checkpoint"),
    ("diffusion_model.", "an image generator's checkpoint"),
    ("first_stage_model.", "an image generator's autoencoder"),
    ("double_blocks.", "an image generator (Flux)"),
    ("joint_blocks.", "an image generator (Stable Diffusion 3)"),
    ("transformer_blocks.", "a part of an image or video generator"),
    ("decoder.up_blocks.", "an image generator's autoencoder"),
    ("decoder.up.", "an image generator's autoencoder"),
    ("lora_unet", "a LoRA adapter of an image generator"),
    ("lora_te", "a LoRA adapter of an image generator"),
    ("text_projection", "the text half of a model that compares images with texts"),
    ("vision_model.", "an image model"), ("visual.", "an image model"),
)  # fmt: skip
_ADAPTER = re.compile(r"lora_[AB]\b|lora_(down|up)\b|\.lora_|hada_w|ia3_l")


def describe(path: Path) -> tuple[str, str] | None:
    """Return format and reason for refusing a file that no backend recognizes; None for no model.

    Reads the start of the file, a safetensors header, and configurations beside it.
    """
    try:
        start = read_bytes(path, _START_BYTES, count=_START_BYTES)
    except (OSError, ImpetusError):
        return None
    if start.startswith(_GGUF):
        return None
    known = _by_content(start) or _SUFFIXES.get(path.suffix.lower())
    if known is None and path.suffix.lower() == ".bin" and path.with_suffix(".xml").is_file():
        known = OtherFormat("openvino", "an OpenVINO model", _FROM_HUB)
    if known is not None:
        return known.format, f"{path.name} is {known.words}; {known.advice}."
    format = _promised_format(path, start)
    if not format:
        return None
    return format, f"{path.name} cannot be used: {_reason(path, format, start)}."


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file stands for another one that Git LFS did not download."""
    try:
        return read_bytes(path, _START_BYTES, count=_START_BYTES).startswith(_LFS_POINTER)
    except (OSError, ImpetusError):
        return False


def kind_around(path: Path, package: Path) -> str:
    """Return what the model of `path` is for, by configurations around it; empty if for text."""
    folders = [path.parent]
    if package != path.parent and path.is_relative_to(package):
        folders.insert(0, package)
    for folder in folders:
        for name in _CONFIGS:
            try:
                kind = other_kind(read_json(folder / name))
            except (OSError, ImpetusError):
                continue
            if kind:
                return kind
    return ""


def _by_content(start: bytes) -> OtherFormat | None:
    for offset, magic, known in _MAGIC:
        if start[offset : offset + len(magic)] == magic:
            return known
    return None


def _promised_format(path: Path, start: bytes) -> str:
    format = natural_format(path)
    is_torch = start.startswith(_ZIP) or _PICKLE.match(start)
    if path.suffix.lower() == ".bin" and not (is_torch or _BIN_NAMES.match(path.name)):
        return ""
    if not format and _HEADER_START.match(start):
        return "safetensors"
    return format


def _reason(path: Path, format: str, start: bytes) -> str:
    if not start.strip(b"\0"):
        what = (
            "it is empty" if not start else "it starts with zeros, as an unfinished download does"
        )
        return f"{what}; download it again"
    if start.startswith(_LFS_POINTER):
        return "it is a Git LFS pointer; its content was not downloaded"
    if start.lstrip().lower().startswith(_TEXTS) and format != "safetensors":
        return "it holds text, such as an error page; download it again"
    if is_training_state(path):
        return (
            "it is training state without a model's weights; put the weights, config.json and "
            "tokenizer beside it"
        )
    if format == "safetensors":
        return _safetensors_reason(path)
    if format == "gguf":
        return "it does not start with GGUF's magic number; download it again"
    if format == "mlx":
        return "it has no config.json and tokenizer beside it, or is not a model"
    if format == "onnx":
        return "it is not an ONNX graph"
    if format == "coreml":
        return "it is not a Core ML package or model that can be read"
    return "it holds no state dict that can be read, or has no config.json beside it"


def _safetensors_reason(path: Path) -> str:
    try:
        header = safetensors_header(path)
    except NotThisFormat:
        return "it has no safetensors header"
    except ImpetusError as problem:
        return problem.message.rstrip(".")
    kind = _purpose(header)
    if kind:
        return f"it is {kind}; {SERVED}"
    config = _config(path.parent)
    if config is None:
        return "it has only weights; put the model's config.json and tokenizer.json beside it"
    if not config.get("model_type"):
        return "the config.json beside it has no model_type, so it is not a language model's"
    return "it is not among the weights that the folder's index and names declare"


def _config(folder: Path) -> Mapping[str, object] | None:
    if not (folder / "config.json").is_file():
        return None
    try:
        return read_optional_json(folder / "config.json")
    except ImpetusError:
        return {}


def _purpose(header: SafetensorsHeader) -> str:
    names = list(header.tensors)
    for prefix, words in _PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return words
    if names and all(_ADAPTER.search(name) for name in names):
        return "a LoRA adapter, which is not a model by itself"
    return ""
