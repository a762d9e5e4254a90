"""Reads how an MLX model's weights are quantized, and checks it against the stored tensors.

Source: `mlx.core.quantize` (modes, with their defaults) and `mlx_lm.utils.load_model`, which takes
a layer's own settings whole, without those of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends.hf.header import broken
from backends.hf.packed import StoredTensor
from core.errors import BrokenModel

# Mode: its default (bits, group size), which are the only ones of all but affine.
_DEFAULTS: Mapping[str, tuple[int, int]] = MappingProxyType({
    "affine": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32),
})  # fmt: skip
_AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (32, 64, 128)
_SCALES = ".scales"
_SIZES = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "n_embd", "d_model", "ffn_hidden_size", "intermediate_size_mlp", "q_lora_rank", "kv_lora_rank",
)  # fmt: skip
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to quantize a matrix: a scale for `group_size` weights of `bits` each."""

    mode: str
    bits: int
    group_size: int


_AFFINE = tuple(Layout("affine", bits, size) for bits in _AFFINE_BITS for size in _AFFINE_GROUPS)
_OTHERS = tuple(Layout(mode, *size) for mode, size in _DEFAULTS.items() if mode != "affine")


@dataclass(frozen=True, slots=True)
class MlxWeights:
    """A model's weights: its main layout if they are quantized, and the number of parameters.

    `keeps_packed`: they have factors that are lost if mlx-lm dequantizes them.
    """

    parameters: int
    main: Layout | None = None
    keeps_packed: bool = False

    @property
    def label(self) -> str:
        """The name for `ModelInfo.quantization`, such as `4bit` or `mxfp4`; empty if plain."""
        if self.main is None:
            return ""
        return f"{self.main.bits}bit" if self.main.mode == "affine" else self.main.mode


def mlx_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization settings in mlx-lm's form, complete; None without any.

    Older models have them as `quantization_config`, which other tools use for their own.
    """
    found = config.get("quantization")
    if found is None:
        other = config.get("quantization_config")
        is_own = isinstance(other, dict) and "quant_method" not in other and "bits" in other
        found = other if is_own else None
    if not isinstance(found, dict):
        return None
    mode = found.get("mode")
    mode = "affine" if mode is None else mode
    bits, group = _DEFAULTS.get(mode, (None, None)) if isinstance(mode, str) else (None, None)
    own = {"mode": mode, "bits": found.get("bits"), "group_size": found.get("group_size")}
    own["bits"] = bits if own["bits"] is None else own["bits"]
    own["group_size"] = group if own["group_size"] is None else own["group_size"]
    return {**found, **own}


def mlx_weights(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> MlxWeights:
    """Describe the weights of the model whose config.json is `path`.

    Raises BrokenModel if the settings and the tensors contradict each other.
    """
    raw = config.get("quantization")
    if raw is not None and not isinstance(raw, dict):
        raise broken(path, f"its quantization is {str(raw)[:40]!r}, not an object")
    _refuse_others(path, config)
    settings = mlx_settings(config)
    packed = {
        name.removesuffix(_SCALES)
        for name in tensors
        if name.endswith(_SCALES) and f"{name.removesuffix(_SCALES)}.weight" in tensors
    }
    if settings is None:
        if packed:
            raise broken(
                path,
                f"it has no quantization, but the weights are quantized ({min(packed)[:80]!r}); "
                "download the model's config.json again",
            )
        return MlxWeights(sum(prod(each.shape) for each in tensors.values()))
    main = _layout(path, settings)
    if not packed:
        raise broken(
            path,
            f"its quantization says {main.bits} bits, but no weight is quantized; remove "
            "quantization from it if that is right, or download the weights again",
        )
    checks = _Checks(path, settings, main, tensors, _widths(config))
    layouts = {base: checks.layout(base) for base in sorted(packed)}
    checks.check_main(layouts)
    parameters = sum(
        prod(tensors[base + _SCALES].shape) * layout.group_size for base, layout in layouts.items()
    )
    parts = (".weight", _SCALES, ".biases", ".global_scale")
    stored = {base + part for base in packed for part in parts}
    rest = sum(prod(each.shape) for name, each in tensors.items() if name not in stored)
    keeps_packed = any(f"{base}.global_scale" in tensors for base in packed)
    return MlxWeights(parameters + rest, main, keeps_packed)


def _refuse_others(path: Path, config: Mapping[str, Any]) -> None:
    """Raise BrokenModel for methods of other tools."""
    other = config.get("quantization_config")
    method = other.get("quant_method") if isinstance(other, dict) else None
    if method is not None and config.get("quantization") is None:
        raise broken(
            path,
            f"its weights are quantized with {str(method)[:40]!r} in MLX's files, which is not "
            "read; use a version that mlx_lm.convert quantized",
        )


def _layout(path: Path, settings: Mapping[str, Any]) -> Layout:
    """Return the layout of complete settings.  Raises BrokenModel."""
    mode, bits, group = settings["mode"], settings["bits"], settings["group_size"]
    if not isinstance(mode, str) or mode not in _DEFAULTS:
        raise broken(
            path,
            f"its quantization has the mode {str(mode)[:40]!r}; MLX has {', '.join(_DEFAULTS)}",
        )
    is_affine = mode == "affine"
    allowed = _AFFINE_BITS if is_affine else (_DEFAULTS[mode][0],)
    groups = _AFFINE_GROUPS if is_affine else (_DEFAULTS[mode][1],)
    for key, value, values in (("bits", bits, allowed), ("group_size", group, groups)):
        if type(value) is not int or value not in values:
            raise broken(
                path,
                f"its quantization has {key}={str(value)[:40]!r}; for {mode} MLX has "
                f"{', '.join(map(str, values))}",
            )
    return Layout(mode, bits, group)


@dataclass(frozen=True, slots=True)
class _Checks:
    path: Path
    settings: Mapping[str, Any]
    main: Layout
    tensors: Mapping[str, StoredTensor]
    widths: frozenset[int]

    def layout(self, base: str) -> Layout:
        """Return the layout of the module `base`.  Raises BrokenModel."""
        words, scales = self.tensors[f"{base}.weight"], self.tensors[base + _SCALES]
        is_affine = scales.dtype != "U8"
        biases = self.tensors.get(f"{base}.biases")
        is_sound = (
            words.dtype == "U32"
            and len(words.shape) == len(scales.shape) >= 2
            and words.shape[:-1] == scales.shape[:-1]
            and prod(words.shape) * prod(scales.shape) > 0
            and (not is_affine or scales.dtype in _FLOATS)
            and (biases is not None) == is_affine
            and (biases is None or biases.shape == scales.shape)
        )
        if not is_sound:
            raise self.wrong(base, "tensors that do not match each other")
        fitting = [
            each
            for each in (_AFFINE if is_affine else _OTHERS)
            if words.shape[-1] * 32 == scales.shape[-1] * each.group_size * each.bits
        ]
        own = self.settings.get(base)
        if own is False:
            raise self.wrong(base, "quantized tensors, and is set to have none")
        if isinstance(own, dict) or own is True:
            layout = self.main
            if isinstance(own, dict):
                layout = _layout(self.path, mlx_settings({"quantization": own}) or {})
            fitting = [each for each in fitting if each == layout]
        if not fitting:
            raise self.wrong(base, "a layout that its tensors do not have")
        # Words and groups leave a factor open, which the model's own sizes tell.
        near = [one for one in fitting if scales.shape[-1] * one.group_size in self.widths]
        near = near or fitting
        return self.main if self.main in near else near[0]

    def check_main(self, layouts: Mapping[str, Layout]) -> None:
        """Raise BrokenModel if no layer has the model's layout, though some should.

        Layers of another mode than the model's are known by their tensors alone.
        """
        shared = [base for base in layouts if not isinstance(self.settings.get(base), dict)]
        shared = [base for base in shared if layouts[base].mode == self.main.mode]
        if shared and not any(layouts[base] == self.main for base in shared):
            main = f"{self.main.mode} with {self.main.bits} bits and group size"
            raise self.wrong(shared[0], f"another layout than {main} {self.main.group_size}")

    def wrong(self, base: str, found: str) -> BrokenModel:
        return broken(
            self.path,
            f"the weights do not match its quantization: {base[:80]!r} has {found}; download both "
            "again",
        )


def _widths(config: Mapping[str, Any]) -> frozenset[int]:
    """Return the numbers of columns that the model's matrices have, as far as they are declared."""
    found = [config.get(key) for key in _SIZES]
    heads = config.get("num_attention_heads")
    for width in (config.get("head_dim"), config.get("v_head_dim")):
        if type(heads) is int and type(width) is int:
            found.append(heads * width)
    return frozenset(each for each in found if type(each) is int)
