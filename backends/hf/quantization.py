"""Reads how a Hugging Face folder's weights are quantized; refuses methods that cannot be read.

Source: transformers' `quantization_config`, AutoGPTQ's `quantize_config.json`, AutoAWQ's
`quant_config.json`, NVIDIA ModelOpt's `hf_quant_config.json`, and the JSON of bitsandbytes'
`QuantState.as_dict`, which lies beside each of its 4-bit weights.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from backends.hf.config import HfFolder
from backends.hf.header import broken, read_optional_json

MAX_STATE_BYTES = 4096
_UNREADABLE: Mapping[str, str] = MappingProxyType({
    "aqlm": "AQLM", "bitnet": "BitNet", "eetq": "EETQ", "exl2": "EXL2", "exl3": "EXL3",
    "fouroversix": "FourOverSix", "fp_quant": "FP-Quant", "gemma": "Gemma's own quantization",
    "gguf": "GGUF", "higgs": "HIGGS", "hqq": "HQQ", "metal": "Metal kernels", "quanto": "Quanto",
    "quark": "AMD Quark", "sinq": "SINQ", "spqr": "SpQR", "torchao": "TorchAO", "vptq": "VPTQ",
})  # fmt: skip
_READABLE = frozenset({
    "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4",
    "mxfp8",
})  # fmt: skip
_ADVICE = "use the model's unquantized weights, or a GGUF or MLX version of it"
# Layouts of AutoAWQ whose files hold the same words as `gemm`.
_AWQ_VERSIONS = ("gemm", "exllama", "ipex")
_GPTQ_FORMATS = ("gptq", "gptq_v2")
_GPTQ_BITS = (2, 3, 4, 8)
_MAX_GROUP = 1 << 20
_COMPRESSED = frozenset({
    "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized",
    "naive-quantized", "nvfp4-pack-quantized", "pack-quantized",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are quantized.

    `bits` is 0 where the method or each tensor decides, `group_size` is 0 for the same reason and
    -1 for one group a column.  `block` is the (rows, columns) of one scale, if declared.
    `is_mixed`: single layers may differ.  `adds_one`: stored zero points are one too small.
    `choices` are the (bits, group size) that compressed-tensors' layers may have.  `label` is the
    name in `ModelInfo.quantization`.
    """

    method: str
    bits: int = 0
    group_size: int = 0
    block: tuple[int, int] | None = None
    is_mixed: bool = False
    adds_one: bool = False
    choices: tuple[tuple[int, int], ...] = ()
    label: str = ""


def declared_quantization(folder: HfFolder) -> Mapping[str, Any] | None:
    """Return config.json's quantization settings, None without any.  Raises BrokenModel."""
    config = folder.path / "config.json"
    for key in ("quantization_config", "compression_config"):
        found = folder.config.get(key)
        if not found:
            continue
        if not isinstance(found, dict):
            raise broken(config, f"its {key} is {str(found)[:40]!r}, not an object")
        if key == "compression_config":
            found = {"quant_method": "compressed-tensors", **found}
        return found
    return None


def quantization_beside(folder: HfFolder) -> Mapping[str, Any] | None:
    """Return the settings in a file of their own, as older tools write them.  Raises BrokenModel.

    They count only if the weights are packed: dense weights may lie beside a forgotten one.
    """
    found = read_optional_json(folder.path / "hf_quant_config.json")
    if found:
        inner = found.get("quantization")
        return {"quant_method": "modelopt", **(inner if isinstance(inner, dict) else found)}
    found = read_optional_json(folder.path / "quantize_config.json")
    if found:
        return {"quant_method": "gptq", **found}
    found = read_optional_json(folder.path / "quant_config.json")
    if found:
        own = {"bits": found.get("w_bit"), "group_size": found.get("q_group_size")}
        return {"quant_method": "awq", **own, **found}
    return None


def read_scheme(folder: HfFolder, settings: Mapping[str, Any]) -> Scheme:
    """Return the scheme of `settings`; raises BrokenModel, by name, for what cannot be read."""
    reader = _Reader(folder, settings)
    method = reader.method()
    match method:
        case "gptq":
            return reader.gptq()
        case "awq":
            return reader.awq()
        case "bitsandbytes":
            bits = 4 if settings.get("load_in_4bit") or settings.get("_load_in_4bit") else 8
            return Scheme(method, bits, label=f"bnb-{bits}bit")
        case "compressed-tensors":
            return reader.compressed()
        case "modelopt":
            return reader.modelopt()
        case "mxfp4":
            return Scheme(method, 4, 32, label="mxfp4")
        case _:
            return Scheme(method, 8, block=reader.block(), label=method.removeprefix("fbgemm_"))


def refuse_unreadable(folder: HfFolder) -> None:
    """Raise BrokenModel if config.json names a quantization that no runtime here can read."""
    settings = declared_quantization(folder)
    if settings is not None:
        read_scheme(folder, settings)


@dataclass(frozen=True, slots=True)
class _Reader:
    folder: HfFolder
    settings: Mapping[str, Any]

    def method(self) -> str:
        """Return the method's name, one of `_READABLE`."""
        value = self.settings.get("quant_method")
        if value is None and any(key.startswith("load_in_") for key in self.settings):
            value = "bitsandbytes"
        if not isinstance(value, str) or not value:
            raise self.wrong("quantization_config names no quant_method; download config.json anew")
        name = value.lower().replace("compressed_tensors", "compressed-tensors")
        if name.startswith("bitsandbytes"):
            return "bitsandbytes"
        if name in ("auto-round", "auto_round", "intel/auto-round"):
            return self.auto_round()
        if name in _READABLE:
            return name
        raise self.refused(_UNREADABLE.get(name, repr(value[:40])))

    def auto_round(self) -> str:
        """Return the method whose layout AutoRound wrote."""
        packing = str(self.settings.get("packing_format", ""))
        if packing.endswith("awq"):
            return "awq"
        if packing.endswith("gptq"):
            return "gptq"
        raise self.refused(f"AutoRound ({packing[:40] or 'no packing_format'})")

    def gptq(self) -> Scheme:
        version = self.settings.get("checkpoint_format") or "gptq"
        if version not in _GPTQ_FORMATS:
            raise self.refused(f"GPTQ in the layout {str(version)[:40]!r}")
        bits = self.number("bits", None)
        if bits not in _GPTQ_BITS:
            raise self.wrong(f"quantization_config has bits={bits}; GPTQ has 2, 3, 4 or 8")
        return Scheme(
            "gptq",
            bits,
            self.group(128),
            is_mixed=any(self.settings.get(key) for key in ("dynamic", "extra_config")),
            adds_one=version == "gptq",
            label=f"gptq-{bits}bit",
        )

    def awq(self) -> Scheme:
        version = str(self.settings.get("version") or "gemm").lower()
        bits = self.number("bits", 4)
        if version not in _AWQ_VERSIONS:
            raise self.refused(f"AWQ in the layout {version[:40]!r}")
        if bits != 4:
            raise self.wrong(f"quantization_config has bits={bits}; AWQ has 4")
        return Scheme("awq", bits, self.group(128), label="awq-4bit")

    def compressed(self) -> Scheme:
        kinds = {str(self.settings.get("format") or "mixed-precision")}
        groups = list(self.groups())
        kinds |= {str(group["format"]) for group in groups if group.get("format")}
        unknown = sorted(kinds - _COMPRESSED)
        if unknown:
            raise self.refused(f"compressed-tensors in the layout {unknown[0][:40]!r}")
        sparsity = self.settings.get("sparsity_config")
        is_sparse = isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"
        if is_sparse or self.settings.get("transform_config"):
            what = "sparse weights" if is_sparse else "rotated weights"
            raise self.refused(f"compressed-tensors with {what}")
        if not groups:
            raise self.wrong("quantization_config has no config_groups with weights")
        choices = {(self.part(one, "num_bits"), self.part(one, "group_size")) for one in groups}
        widths = {bits for bits, _ in choices}
        bits = widths.pop() if len(widths) == 1 else 0
        return Scheme(
            "compressed-tensors",
            bits,
            choices=tuple(sorted(choices)),
            block=self.block(),
            is_mixed=len(groups) > 1,
            label=f"compressed-tensors-{bits}bit" if bits else "compressed-tensors",
        )

    def groups(self) -> Iterator[Mapping[str, Any]]:
        """Yield the groups of layers whose weights are quantized."""
        groups = self.settings.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict) and isinstance(group.get("weights"), dict):
                yield group

    def part(self, group: Mapping[str, Any], key: str) -> int:
        value = group["weights"].get(key)
        if value is None and key == "group_size":
            return 0
        low, high = (-1, _MAX_GROUP) if key == "group_size" else (1, 8)
        if type(value) is not int or not low <= value <= high or value == 0:
            raise self.wrong(f"quantization_config has {key}={str(value)[:40]!r}")
        return value

    def modelopt(self) -> Scheme:
        algorithm = str(self.settings.get("quant_algo") or "").upper()
        if algorithm.startswith("FP8"):
            return Scheme("modelopt", 8, label="fp8")
        if algorithm == "NVFP4":
            return Scheme("modelopt", 4, 16, label="nvfp4")
        if algorithm == "MIXED_PRECISION":
            return Scheme("modelopt", is_mixed=True, label="nvfp4")
        raise self.refused(f"ModelOpt {algorithm[:40] or 'without a quant_algo'}")

    def block(self) -> tuple[int, int] | None:
        """Return the declared (rows, columns) of one scale."""
        values = [self.settings.get("weight_block_size")]
        values += [group["weights"].get("block_structure") for group in self.groups()]
        for value in values:
            if value is None:
                continue
            sizes = value if isinstance(value, list) else [value]
            if len(sizes) != 2 or not all(type(x) is int and 1 <= x <= _MAX_GROUP for x in sizes):
                raise self.wrong(
                    f"quantization_config has a weight_block_size of {str(value)[:40]}, not two "
                    "positive integers"
                )
            return sizes[0], sizes[1]
        return None

    def group(self, default: int) -> int:
        size = self.number("group_size", default)
        if size != -1 and not 1 <= size <= _MAX_GROUP:
            raise self.wrong(f"quantization_config has group_size={size}")
        return size

    def number(self, key: str, default: int | None) -> int:
        value = self.settings.get(key)
        value = default if value is None else value
        if type(value) is not int:
            raise self.wrong(f"quantization_config has {key}={str(value)[:40]!r}, not an integer")
        return value

    def wrong(self, reason: str) -> Exception:
        return broken(self.folder.path / "config.json", f"its {reason}")

    def refused(self, method: str) -> Exception:
        reason = f"its weights are quantized with {method}, which no runtime here reads; {_ADVICE}"
        return broken(self.folder.path / "config.json", reason)


@dataclass(frozen=True, slots=True)
class BnbState:
    """A 4-bit weight's shape, the weights per scale, and how the scales are quantized."""

    shape: tuple[int, ...]
    block_size: int
    nested_block_size: int
    nested_offset: float


def read_bnb_state(data: bytes, count: int) -> BnbState:
    """Return the state in `data`, of a weight of `count` values, or one less.

    Raises ValueError if it is not one.
    """
    if len(data) > MAX_STATE_BYTES:
        raise ValueError(f"its quant_state has {len(data)} bytes, over {MAX_STATE_BYTES}")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise ValueError("its quant_state is not valid JSON") from problem
    if not isinstance(found, dict):
        raise ValueError("its quant_state is not an object")
    shape, size = found.get("shape"), found.get("blocksize")
    nested, offset = found.get("nested_blocksize"), found.get("nested_offset")
    nested = 256 if nested is None else nested
    offset = 0.0 if offset is None else offset
    is_sound = (
        isinstance(shape, list)
        and 1 <= len(shape) <= 4
        and all(type(each) is int and each > 0 for each in (*shape, size, nested))
        and isinstance(offset, float | int)
        and math.prod(shape) in (count, count - 1)
    )
    if not is_sound or not isinstance(shape, list) or not isinstance(size, int):
        raise ValueError(
            f"its quant_state has shape {str(shape)[:60]} and blocksize {str(size)[:20]} for "
            f"{count} values"
        )
    return BnbState(tuple(shape), size, nested, float(offset))
