"""Recognizes adapters (LoRA), which are not models by themselves."""

import re
from pathlib import Path

from backends.hf.header import broken, read_optional_json
from core.errors import BrokenModel

# PEFT writes adapter_model.safetensors; mlx-lm adapters.safetensors, 0000100_adapters.safetensors.
_NAME = re.compile(r"(\d+_)?adapters?(_model)?([._-].*)?\.(safetensors|bin|npz|pt|pth)", re.DOTALL)


def refuse_adapter(path: Path) -> None:
    """Raise BrokenModel, with the base model's name, if `path` has the name of an adapter."""
    if _NAME.fullmatch(path.name):
        raise adapter_error(path)


def adapter_error(path: Path) -> BrokenModel:
    """Return the error for an adapter, or its configuration, at `path`."""
    try:
        config = read_optional_json(path.with_name("adapter_config.json"))
    except BrokenModel:
        config = {}
    base = config.get("base_model_name_or_path") or config.get("model")
    name = base if isinstance(base, str) else ""
    name = "".join(char for char in name if char.isprintable())[:100]
    of = f" of {name!r}" if name else ""
    return broken(
        path,
        f"it is an adapter (LoRA){of}, which is not a model by itself; merge it into that model, "
        "for example with PEFT's merge_and_unload or mlx_lm.fuse, and use the result",
    )
