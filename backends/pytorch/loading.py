"""Loads a model folder on PyTorch and opens its engine, for safetensors and PyTorch weights."""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from backends.base import Availability, Engine, EngineOptions, MemoryEstimate, ModelInfo
from backends.engine.row_stepper import RowStepper
from backends.engine.trial.checks import rounded_length
from backends.engine.trial.results import trial_key, tried
from backends.hf.config import HfFolder
from backends.hf.engine import open_token_engine
from backends.hf.folder import read_folder
from backends.hf.header import broken
from backends.hf.memory import estimate_transformer
from backends.hf.tokenizer import HfTokenizer
from backends.pytorch.dequantize import dequantize, forget_quantization
from backends.pytorch.embedding import Task, open_encoder
from backends.pytorch.packing import limitations, open_rows, try_rows
from backends.pytorch.placement import LIBRARIES, place
from backends.pytorch.placement import limitations as place_limitations
from backends.pytorch.weights import SUFFIXES, load_tensors
from backends.stepper import Stepper
from backends.trials import TrialOptions
from core.errors import BackendUnavailable, ImpetusError, InsufficientMemory
from core.types import Capability
from core.units import MIB

# Measured: PyTorch and transformers after import, with their buffers for a step.
_BASE_BYTES = 320 * MIB
_ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
_PLAIN = ("f64", "f32", "f16", "bf16")
_DECLARED = {"float16": "f16", "bfloat16": "bf16"}
_SPARE_ROWS = 16
# RoPE types whose frequencies change beyond the original context, to which it is limited.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")
_WEIGHTS = SUFFIXES | {".safetensors"}


def torch_availability() -> Availability:
    """Return whether PyTorch and transformers are installed; imports neither."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return Availability(False, f"{' and '.join(missing)} is not installed; run scripts/setup")
    return Availability(True)


def limit_context_for_torch(info: ModelInfo, folder: HfFolder) -> ModelInfo:
    """Return `info` with its context limited to what keeps the KV cache of past tokens valid."""
    scaling = folder.config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return info
    if scaling.get("rope_type", scaling.get("type")) not in _LENGTH_DEPENDENT_ROPE:
        return info
    original = scaling.get("original_max_position_embeddings") or folder.config.get(
        "original_max_position_embeddings"
    )
    if type(original) is not int or not 0 < original < info.context_length:
        return info
    return replace(info, context_length=original)


def run_dtype(info: ModelInfo) -> str:
    """Return the type to compute in: bf16, f16 on Metal only, else f32.

    Quantized weights are dequantized to the type that config.json declares on Metal, and
    elsewhere to f32, which keeps their exact values.
    """
    kind = info.quantization
    if kind not in _PLAIN and sys.platform == "darwin":
        kind = _DECLARED.get(str(info.details.get("torch_dtype")), "f32")
    if kind == "bf16" or (kind == "f16" and sys.platform == "darwin"):
        return kind
    return "f32"


def estimate_torch(info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
    """Return the bytes an engine holds; see `Backend.estimate`."""
    element_bytes = _ELEMENT_BYTES[run_dtype(info)]
    return estimate_transformer(
        info,
        options,
        weights_bytes=info.parameters * element_bytes,
        kv_element_bytes=element_bytes,
        base_bytes=_BASE_BYTES,
    )


def open_torch(info: ModelInfo, options: EngineOptions) -> Engine:
    """Load the model and open its engine; blocks.  See `Backend.open`."""
    available = torch_availability()
    if not available.is_available:
        raise BackendUnavailable(available.reason, param="model")
    granted = estimate_torch(info, options)
    options = options.granted(granted)
    folder = read_folder(info.files[0].parent)
    trial = options.trial or TrialOptions()
    if info.capabilities & {Capability.EMBEDDING, Capability.RERANK}:
        return open_encoder(info, folder, options, partial(_load_placed, info, folder, trial))
    tokenizer = HfTokenizer(folder.path)

    def open_stepper() -> Stepper:
        # PyTorch keeps this setting per thread, so it is set on the engine's.
        import torch

        torch.set_num_threads(options.threads)
        model = load_model(info, folder)
        placed = place(model, info, trial)
        length = rounded_length(granted.context_tokens)
        result = tried(
            info.name,
            trial_key(info.files, LIBRARIES, f"{model.dtype} {model.device} {length}"),
            trial,
            lambda: try_rows(model, trial.hold, context_tokens=length),
        )
        rows = open_rows(model, max_rows=options.max_sequences + _SPARE_ROWS, result=result)
        stepper = RowStepper(rows, tokenizer, options)
        noted = place_limitations(info.name, placed)
        stepper.limitations = (*noted, *limitations(info.name, result))
        return stepper

    return open_token_engine(
        info,
        folder,
        tokenizer,
        open_stepper,
        options,
        context_tokens=granted.context_tokens,
    )


def weights_of(info: ModelInfo) -> tuple[Path, ...]:
    """Return the weight files among the model's files."""
    return tuple(path for path in info.files if path.suffix in _WEIGHTS)


def torch_dtype(info: ModelInfo) -> Any:
    """Return the torch dtype that the model is computed in."""
    import torch

    names = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return names[run_dtype(info)]


def import_torch() -> None:
    """Import PyTorch and transformers; blocks for seconds the first time."""
    import torch  # noqa: F401
    import transformers  # noqa: F401


def load_model(info: ModelInfo, folder: HfFolder, task: Task = "text generation") -> Any:
    """Load the transformers model for a task on the CPU; never uses the network.

    Weights stay memory-mapped if their type is the one computed in.
    Raises BrokenModel, InsufficientMemory.
    """
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config_path = folder.path / "config.json"
    try:
        config = AutoConfig.from_pretrained(
            str(folder.path), local_files_only=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except Exception as problem:
        # What a library raises for a configuration that makes no sense is not one of a few types.
        raise broken(config_path, f"transformers cannot read it: {_words(problem)}") from problem
    classes = _classes(task, config)
    if type(config) not in classes:
        kind = str(folder.config.get("model_type"))[:60]
        raise broken(config_path, f"transformers has no {task} for {kind!r}")
    model_class = classes[type(config)]
    try:
        tensors = dequantize(folder, load_tensors(weights_of(info)), torch_dtype(info))
        forget_quantization(config)
        model, report = _with_weights(model_class, config, tensors, torch_dtype(info))
        # Each weight is then freed as it moves to the device.
        tensors.clear()
    except (MemoryError, torch.OutOfMemoryError) as problem:
        raise InsufficientMemory(
            f"The model {info.name} does not fit into memory: {problem}", param="model"
        ) from problem
    except ImpetusError:
        raise
    except Exception as problem:
        reason = f"transformers cannot load it: {_words(problem)}"
        raise broken(info.files[0], reason) from problem
    # The pooler of an encoder is not used: token vectors are pooled here.
    unused = "pooler." if task == "embeddings" else "\0"
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(unused))
    if missing:
        names = ", ".join(missing[:3])
        raise broken(info.files[0], f"{len(missing)} weights are missing: {names}")
    return model.eval()


def _load_placed(info: ModelInfo, folder: HfFolder, trial: TrialOptions, task: Task) -> Any:
    """Load a model and move it to the device that computes it rightly; see `load_model`."""
    model = load_model(info, folder, task)
    place(model, info, trial)
    return model


def _classes(task: Task, config: Any) -> Mapping[Any, Any]:
    """Return transformers' classes for a task, by the type of their configuration."""
    from transformers.models.auto import modeling_auto

    if task == "text generation":
        mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    elif task == "reranking":
        mapping = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    else:
        mapping = modeling_auto.MODEL_MAPPING
        encoders = modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
        # T5's own class has a decoder too, which embeddings do without.
        if type(config) in encoders and encoders[type(config)].__name__.endswith("EncoderModel"):
            mapping = encoders
    return cast("Mapping[Any, Any]", mapping)


def _with_weights(model_class: Any, config: Any, tensors: Mapping[str, Any], dtype: Any) -> Any:
    """Return the model and the loading report."""

    def load(attention: str) -> Any:
        return model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )

    # Set explicitly, so that no configuration can request a kernel from the network.
    try:
        return load("sdpa")
    except ValueError as problem:
        if "scaled_dot_product_attention" not in str(problem):
            raise
        return load("eager")


def _words(problem: BaseException) -> str:
    """Return an exception's first two lines as one; its type where it has no text."""
    lines = [line.strip() for line in str(problem).strip().splitlines()[:2]]
    return " ".join(lines)[:300] or type(problem).__name__
