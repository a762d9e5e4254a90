"""Maps the tensor names of a trainer's checkpoint to the model's own names.

Sources of the wrappers: PyTorch's DataParallel, torch.compile, FSDP and AveragedModel, DeepSpeed,
Lightning, and TRL.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from backends.hf.header import broken

# Modules that wrap others, at any depth of a name.
_WRAPPERS = frozenset({
    "_checkpoint_wrapped_module", "_forward_module", "_fsdp_wrapped_module", "_orig_mod",
})  # fmt: skip
# Attributes in which training code keeps the whole model.
_HOLDERS = (
    "base_model.model", "pretrained_model", "online_model", "policy", "student", "network", "net",
    "llm", "_model", "model",
)  # fmt: skip
_ROOTS = frozenset({
    "backbone", "bert", "embed_out", "gpt_neox", "lm_head", "model", "roberta", "transformer",
})  # fmt: skip
# Inside `model.`, other roots may also be names of a model's own parts.
_ROOTS_IN_MODEL = frozenset({"gpt_neox", "lm_head", "model", "transformer.h"})
_MAX_HOLDERS = 4
_AVERAGES = tuple(
    f"{name}."
    for name in ("ema", "ema_model", "model_ema", "ema_network", "averaged_model", "avg_model")
)
# Of training only: counters, and the heads of reward models and metrics.
_NOT_WEIGHTS = re.compile(
    r"n_averaged$|v_head\..|(criterion|loss|loss_fn|metrics?|(train|val|valid|test)_\w{1,64})\.."
)
_MODULES = re.compile(r"\A(module\.)+(?=.)")
_ADAPTED = frozenset({
    "base_layer", "lora_A", "lora_B", "lora_a", "lora_b", "lora_embedding_A", "lora_embedding_B",
    "lora_magnitude_vector",
})  # fmt: skip
_ADAPTED_HINTS = ("lora_", "base_layer")
# Source: the checkpoints of Meta's llama and of mistral-inference.
_ORIGINAL = re.compile(r"(layers\.\d+\.attention\.w[qkvo]|tok_embeddings)\.weight$")


def model_names(path: Path, stored: Collection[str]) -> Mapping[str, str]:
    """Map the names in `stored` that are the model's weights to the names it gives them.

    Wrappers are removed; averaged copies (EMA) are left out if the trained weights are there, as
    is what belongs to training only.  `path` is the weight file that errors name.  Raises
    BrokenModel for unmerged adapters, and if two tensors have the same name.
    """
    names = {name: _unwrapped(name) for name in stored}
    names = {old: new for old, new in names.items() if not _NOT_WEIGHTS.match(new)}
    names = _without_averages(names)
    for _ in range(_MAX_HOLDERS):
        names = _without_holder(names)
    adapted = next((old for old, new in names.items() if _is_adapted(new)), None)
    if adapted is not None:
        raise broken(
            path,
            f"an adapter (LoRA) is not merged into its weights ({adapted[:80]!r}); merge it, for "
            "example with PEFT's merge_and_unload, and save the model again",
        )
    if any(_ORIGINAL.match(new) for new in names.values()):
        raise broken(
            path,
            "its weights have the names of Meta's or Mistral's own code; use the model's Hugging "
            "Face version (model.safetensors)",
        )
    flat = next((old for old in names if "flat_param" in old), None)
    if flat is not None:
        raise broken(
            path,
            f"it is a shard of FSDP's training state ({flat[:80]!r}); save the full state dict",
        )
    if len(set(names.values())) < len(names):
        twice = _first_twice(names)
        raise broken(path, f"it has the tensor {twice[:80]!r} twice, under different wrappers")
    return MappingProxyType(names)


def _unwrapped(name: str) -> str:
    """Return a name without the wrappers in it; `module` wraps at the start only."""
    if any(wrapper in name for wrapper in _WRAPPERS):
        name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _MODULES.sub("", name, count=1)


def _is_adapted(name: str) -> bool:
    """Whether a name is of a part of an adapter, or of what one wraps."""
    has_hint = any(hint in name for hint in _ADAPTED_HINTS)
    return has_hint and any(part in _ADAPTED for part in name.split("."))


def _without_averages(names: dict[str, str]) -> dict[str, str]:
    """Leave averaged copies out; if there are no other weights, they are the model."""
    kept = {old: new for old, new in names.items() if not new.startswith(_AVERAGES)}
    if kept or not names:
        return kept
    return {old: _unwrapped(new.partition(".")[2]) for old, new in names.items()}


def _without_holder(names: dict[str, str]) -> dict[str, str]:
    """Return the names without an attribute that all share, if they share one."""
    for holder in _HOLDERS:
        prefix = f"{holder}."
        if not names or not all(name.startswith(prefix) for name in names.values()):
            continue
        roots = _ROOTS_IN_MODEL if holder == "model" else _ROOTS
        starts = tuple(f"{prefix}{inner}{root}." for root in roots for inner in ("", "module."))
        if any(name.startswith(starts) for name in names.values()):
            return {old: _unwrapped(new.removeprefix(prefix)) for old, new in names.items()}
    return names


def _first_twice(names: Mapping[str, str]) -> str:
    seen: set[str] = set()
    for name in names.values():
        if name in seen:
            return name
        seen.add(name)
    return ""
