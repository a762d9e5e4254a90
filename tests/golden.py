"""Golden models: the starter in every format, built once by the project's own conversions.

They stand in the user's cache under a hash of the conversion sources and the runtimes' versions,
so that a change of either builds them anew.  `golden` and `reference` may be called by several
processes at once.
"""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from backends.base import ModelInfo
from backends.gguf.file import gguf_info
from catalog.convert.run import ConversionRequest, convert, sweep
from core.types import Capability
from tests.cache import cache_folder, locked
from tests.requests import GreedyTokens
from tests.starter import starter_path

ROOT = Path(__file__).resolve().parent.parent
_PINNED = (
    "torch", "transformers", "tokenizers", "safetensors", "gguf", "llama-cpp-python", "mlx",
    "mlx-lm", "onnx", "onnxruntime-genai", "onnxscript", "coremltools",
)  # fmt: skip
_PROMPTS = ("The sea is", "What is gravity?", "def add(a, b):")
_TOKENS = 32
# The sources that decide what is written; the others decide how it is run.
_SOURCES = (
    "job", "sidecars", "tensor_file", "steps/dtypes", "steps/from_gguf", "steps/gguf_config",
    "steps/gguf_tokenizer", "steps/gguf_to_mlx", "steps/hf_defaults", "steps/hf_source",
    "steps/number_check", "steps/onnx_builder", "steps/onnx_pieces", "steps/onnx_source",
    "steps/rotary", "steps/to_gguf", "steps/to_mlx", "steps/to_onnx",
    "steps/to_safetensors", "steps/torch_files",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".npz", ".gguf", ".onnx")


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy tokens by PyTorch in float32, with end tokens not heeded.

    `ids` are the prompts through the chat template; `tokens` 32 of the answer to each, equal to
    what a runtime of this system may choose.
    """

    prompts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    tokens: tuple[GreedyTokens, ...]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """A conversion of another golden model, the starter itself being `starter`."""

    source: str
    target_format: str
    quantization: str
    exporter: str = "auto"


_CONVERSIONS: Mapping[str, _Recipe] = {
    "hf-f32": _Recipe("starter", "safetensors", "f32"),
    "mlx-f32": _Recipe("hf-f32", "mlx", "f32"),
    "mlx-4bit": _Recipe("hf-f32", "mlx", "4bit"),
    "mlx-blocks": _Recipe("starter", "mlx", "original"),
    "onnx-f32": _Recipe("hf-f32", "onnx", "f32", "genai"),
    "onnx-int4": _Recipe("hf-f32", "onnx", "int4", "genai"),
    "onnx-torch": _Recipe("hf-f32", "onnx", "f32", "torch"),
    "coreml": _Recipe("hf-f32", "coreml", "f32"),
    "gguf-f32": _Recipe("hf-f32", "gguf", "f32"),
}


def golden(kind: str) -> Path:
    """Return a golden model, building it and what it is made of where needed.

    A folder, but for "gguf-f32" the file in it.  Blocks, for up to two minutes the first time.
    """
    folder = _folder(kind)
    with locked(folder):
        if not folder.is_dir():
            _builder(kind)(folder)
    return next(folder.glob("*.gguf")) if kind == "gguf-f32" else folder


def reference() -> Reference:
    """Return the tokens that every full-precision conversion must give."""
    path = _cache() / "greedy.json"
    source = golden("hf-f32")
    with locked(path):
        if not path.is_file():
            # A process of its own: PyTorch's threads and memory do not stay in the tests'.
            command = [sys.executable, "-m", "tests.golden", str(source), str(path)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    read = json.loads(path.read_text())
    return Reference(
        tuple(read["prompts"]),
        tuple(tuple(ids) for ids in read["ids"]),
        tuple(
            GreedyTokens(*each)
            for each in zip(read["tokens"], read["seconds"], read["gaps"], strict=True)
        ),
    )


def folder_info(format: str, folder: Path) -> ModelInfo:
    """Return what conversions need to know of a folder with the starter's weights."""
    files = sorted(
        (path.absolute() for path in folder.iterdir() if path.is_file()),
        key=lambda path: (path.suffix not in _WEIGHTS, path.name),
    )
    config = json.loads((folder / "config.json").read_text())
    return ModelInfo(
        format=format,
        name=folder.name,
        architecture=config["model_type"],
        quantization="f32",
        files=tuple(files),
        size_bytes=sum(path.stat().st_size for path in files),
        parameters=gguf_info(starter_path()).parameters,
        context_length=config["max_position_embeddings"],
        capabilities=frozenset({Capability.CHAT, Capability.COMPLETION}),
    )


@cache
def _cache(extra: str = "") -> Path:
    """Return the folder of this state of what makes the weights, without leftovers.

    `extra` is a pattern of further sources that count.  Folders of other states go after a while.
    """
    digest = hashlib.sha256(repr((_CONVERSIONS, _PROMPTS, _TOKENS)).encode())
    sources = [ROOT / "catalog" / "convert" / f"{name}.py" for name in _SOURCES]
    for path in [*sources, *sorted(ROOT.glob(extra or "-"))]:
        digest.update(path.name.encode() + path.read_bytes())
    for name in _PINNED:
        digest.update(f"{name}=={version(name)}\n".encode())
    with starter_path().open("rb") as stream:
        digest.update(hashlib.file_digest(stream, "sha256").digest())
    folder = cache_folder("golden", digest.hexdigest())
    sweep(folder)
    return folder


def _folder(kind: str) -> Path:
    """Return where a kind stands; Core ML's sources change no other's."""
    return _cache("catalog/convert/steps/*coreml*.py" if kind == "coreml" else "") / kind


def _builder(kind: str) -> Callable[[Path], None]:
    if kind in _CONVERSIONS:
        return lambda folder: _convert(_CONVERSIONS[kind], folder)
    return {"pytorch": _build_pytorch, "pt": _build_pt, "npz": _build_npz}[kind]


def _convert(recipe: _Recipe, folder: Path) -> None:
    if recipe.source == "starter":
        info = gguf_info(starter_path())
    else:
        info = folder_info("safetensors", golden(recipe.source))
    request = ConversionRequest(
        info,
        recipe.target_format,
        folder,
        quantization=recipe.quantization,
        exporter=recipe.exporter,
        context_tokens=512 if recipe.target_format == "coreml" else None,
    )
    asyncio.run(convert(request))


@contextmanager
def _copied(folder: Path, source: str) -> Iterator[Path]:
    """Give a hidden folder with a golden model's configurations; at the end it gets its name."""
    hidden = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(hidden, ignore_errors=True)
    weights = shutil.ignore_patterns("*.safetensors", "*.index.json", "provenance.json")
    shutil.copytree(golden(source), hidden, ignore=weights)
    yield hidden
    hidden.rename(folder)


def _build_pytorch(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    with _copied(folder, "hf-f32") as hidden:
        tensors = load_file(golden("hf-f32") / "model.safetensors")
        torch.save(tensors, hidden / "pytorch_model.bin")


def _build_pt(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    with _copied(folder, "hf-f32") as hidden:
        tensors = load_file(golden("hf-f32") / "model.safetensors")
        torch.save({"state_dict": tensors}, hidden / "model.pt")


def _build_npz(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    with _copied(folder, "mlx-f32") as hidden:
        np.savez(hidden / "weights.npz", **load_file(golden("mlx-f32") / "model.safetensors"))


def _write_reference(source: Path, target: Path) -> None:
    """Generate with PyTorch and write `Reference` as JSON in one rename."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    ids: list[list[int]] = []
    tokens: list[list[int]] = []
    seconds: list[list[int]] = []
    gaps: list[list[float]] = []
    for prompt in _PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        prompt_ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        given = torch.tensor([prompt_ids])
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=_TOKENS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids.append(list(prompt_ids))
        tokens.append(made.sequences[0].tolist()[len(prompt_ids) :])
        best = torch.cat(made.logits).float().log_softmax(-1).topk(2)
        seconds.append(best.indices[:, 1].tolist())
        gaps.append((best.values[:, 0] - best.values[:, 1]).tolist())
    hidden = target.with_name(f".{target.name}.{os.getpid()}")
    known = {"prompts": _PROMPTS, "ids": ids, "tokens": tokens, "seconds": seconds, "gaps": gaps}
    hidden.write_text(json.dumps(known))
    hidden.rename(target)


if __name__ == "__main__":
    _write_reference(Path(sys.argv[1]), Path(sys.argv[2]))
