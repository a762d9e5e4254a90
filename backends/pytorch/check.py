"""Checks whether transformers can load a model, by its real classes and tensor shapes; no weights.

Also builds small models with random weights, which other runtimes are compared with.  Imports torch
and runs transformers' code on a model's configuration: for limited child processes only.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.hf.config import HfFolder
from backends.hf.fit import SHARED_DTYPES, RuntimeFit, TensorShape, first_line, importing
from backends.pytorch.dequantize import forget_quantization

_DTYPES = {
    **SHARED_DTYPES, "BOOL": "bool", "F64": "float64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_MOST_PARAMETERS = 40_000_000
# Standard deviations that keep differences between implementations visible in the logits.
_DEVIATION = 0.12
_EMBEDDING_DEVIATION = 0.6
_BIAS_DEVIATION = 0.05
_NORM_DEVIATION = 0.1


@dataclass(frozen=True, slots=True)
class Reference:
    """A small model with random weights: those as they are saved, and its logits.

    `logits` has the shape (tokens, vocabulary).
    """

    weights: Mapping[str, NDArray[np.float32]]
    logits: NDArray[np.float32]


def check_torch(folder: HfFolder, tensors: Mapping[str, TensorShape]) -> RuntimeFit:
    """Load tensors of these shapes, of unpacked weights, without storage; allocates no weights.

    Blocks for 1 to 3 s the first time.  Raises MemoryError, BackendUnavailable if PyTorch cannot be
    imported.
    """
    with importing("PyTorch and transformers"):
        import torch  # noqa: F401
        from transformers.modeling_utils import PreTrainedModel  # noqa: F401
    try:
        model_class, config = _classes(folder)
        model, report = _load_placeholders(model_class, config, tensors)
    except MemoryError:
        raise
    except (Exception, SystemExit) as problem:
        return RuntimeFit(f"transformers cannot load it: {first_line(problem)}")
    missing = sorted(report["missing_keys"])
    if missing:
        names = ", ".join(missing[:3])
        return RuntimeFit(
            f"{len(missing)} tensors that transformers needs are missing: {names[:200]}"
        )
    return RuntimeFit("", sum(parameter.numel() for parameter in model.parameters()) - _tied(model))


def _tied(model: Any) -> int:
    """Return how many parameters are stored twice: without storage no two tensors are equal."""
    try:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        # Models whose classes do not tell.
        return 0
    text = model.config.get_text_config(decoder=True)
    if not getattr(text, "tie_word_embeddings", False):
        return 0
    head, embedding = getattr(head, "weight", None), getattr(embedding, "weight", None)
    if head is None or embedding is None or head is embedding or head.shape != embedding.shape:
        return 0
    return int(head.numel())


def compute_reference(raw: Mapping[str, Any], tokens: list[int]) -> Reference:
    """Build a model of the configuration `raw` with random weights, and compute its logits.

    Raises ValueError for more than 40 million parameters, and what transformers raises.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[str(raw["model_type"])].from_dict(dict(raw))
    model_class = _reference_class(config)
    with torch.device("meta"):
        size = sum(each.numel() for each in _new_model(model_class, config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"a small version of it has {size} parameters")
    model = _new_model(model_class, config).eval()
    _randomize(model)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
        state = revert_weight_conversion(model, _untied(model.state_dict()))
    weights = {name: tensor.float().contiguous().numpy() for name, tensor in state.items()}
    return Reference(weights, logits.numpy())


def _classes(folder: HfFolder) -> tuple[Any, Any]:
    """Return the model's class and its configuration, as `load_model` finds them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        str(folder.path), local_files_only=True, trust_remote_code=False
    )
    forget_quantization(config)
    return _generating_class(config), config


def _generating_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"it has no text generation for {config.model_type!r}")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _reference_class(config: Any) -> Any:
    """Return a class that computes logits, also for a text model beside an image encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return _generating_class(config)


def _load_placeholders(
    model_class: Any, config: Any, tensors: Mapping[str, TensorShape]
) -> tuple[Any, Any]:
    import torch
    from transformers.utils import logging

    # Neither threads nor a progress bar.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    placeholders = {
        name: torch.empty(each.shape, dtype=getattr(torch, _DTYPES[each.dtype]), device="meta")
        for name, each in tensors.items()
    }
    return model_class.from_pretrained(  # type: ignore[no-any-return]
        None,
        config=config,
        state_dict=placeholders,
        dtype=torch.float32,
        device_map={"": "meta"},
        attn_implementation="eager",
        output_loading_info=True,
    )


def _new_model(model_class: Any, config: Any) -> Any:
    import torch

    return model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)


def _randomize(model: Any) -> None:
    import torch

    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim >= 2:
                is_embedding = "embed" in name or "wte" in name
                parameter.copy_(noise * (_EMBEDDING_DEVIATION if is_embedding else _DEVIATION))
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(noise * _NORM_DEVIATION)
            elif name.endswith("bias"):
                parameter.copy_(noise * _BIAS_DEVIATION)
    model.tie_weights()


def _untied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors that are saved: of those that share their storage only the first."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen or not tensor.numel():
            kept[name] = tensor
        seen.add(key)
    return kept
