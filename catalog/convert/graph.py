"""The graph of conversions between formats: steps, required packages, quantizations."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

from backends.base import ModelInfo
from catalog.convert.steps.coreml_decoder import FAMILY as COREML_FAMILY
from catalog.convert.steps.gguf_config import ARCHITECTURES as GGUF_FAMILY
from catalog.convert.support import LLAMA_FAMILY, ONNX_TRACED, step_reason
from core.errors import UnsupportedCapability
from core.types import Capability

ORIGINAL = "original"
FULL_PRECISION = ("f32", "bf16", "f16")
MLX_BITS = {f"{bits}bit": bits for bits in (4, 8, 6, 5, 3, 2)}
MLX_GROUP_SIZES = (32, 64, 128)
# Tensor types that MLX stores in the same blocks as GGUF (Source: mlx/io/gguf.cpp).
MLX_BLOCKS = frozenset({"f32", "f16", "q4_0", "q4_1", "q8_0"})

GGUF_QUANTIZED = ("q4_k_m", "q8_0", "q6_k", "q5_k_m", "q4_0", "q4_1", "q3_k_m", "q2_k")

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "safetensors": FULL_PRECISION,
    "mlx": (*MLX_BITS, *FULL_PRECISION),
    "gguf": (*GGUF_QUANTIZED, *FULL_PRECISION),
    "onnx": ("int4", "int8", "f32"),
    "coreml": ("mixed", "f32", "f16"),
}
TARGETS = tuple(_CHOICES)


@dataclass(frozen=True, slots=True)
class _Edge:
    """One step: the packages it imports, and its rough list of architectures (empty: all).

    What else decides is in `catalog.convert.support`.
    """

    packages: tuple[str, ...]
    architectures: Collection[str] = ()


_GGUF_PACKAGES = ("torch", "transformers", "gguf", "llama_cpp")
_EDGES: Mapping[tuple[str, str], _Edge] = {
    ("pytorch", "safetensors"): _Edge(("torch", "safetensors")),
    ("gguf", "safetensors"): _Edge(_GGUF_PACKAGES, GGUF_FAMILY),
    ("gguf", "gguf"): _Edge(("llama_cpp",)),
    ("safetensors", "safetensors"): _Edge(("torch", "safetensors")),
    ("safetensors", "mlx"): _Edge(("mlx", "mlx_lm", "transformers")),
    ("safetensors", "gguf"): _Edge((*_GGUF_PACKAGES, "tokenizers"), LLAMA_FAMILY),
    ("safetensors", "onnx"): _Edge(("torch", "transformers", "onnx"), ONNX_TRACED),
    ("safetensors", "coreml"): _Edge(("torch", "transformers", "coremltools"), COREML_FAMILY),
}
# Keeps the blocks of a quantized file, so it cannot be part of a longer route.
_BLOCKS_EDGE = _Edge(("mlx", "transformers", "gguf", "llama_cpp"), GGUF_FAMILY)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion of one model; `quantizations` lists the choices, the default first.

    `reason` says why the conversion is not possible; empty if it is.
    """

    target_format: str
    quantizations: tuple[str, ...]
    reason: str = ""

    @property
    def is_possible(self) -> bool:
        """Whether the conversion can be requested."""
        return not self.reason


def plan(source_format: str, target_format: str, quantization: str = "") -> tuple[str, ...]:
    """Return the formats on the shortest route, including both ends.

    With `ORIGINAL`, GGUF to MLX is one step that keeps the blocks unchanged.
    Raises UnsupportedCapability if there is no route.
    """
    if (source_format, target_format, quantization) == ("gguf", "mlx", ORIGINAL):
        return ("gguf", "mlx")
    if (source_format, target_format) in _EDGES:
        return (source_format, target_format)
    queue: deque[tuple[str, ...]] = deque([(source_format,)])
    seen = {source_format}
    while queue:
        route = queue.popleft()
        for start, end in _EDGES:
            if start == route[-1] and end not in seen:
                if end == target_format:
                    return (*route, end)
                seen.add(end)
                queue.append((*route, end))
    raise UnsupportedCapability(
        f"There is no conversion from {source_format} to {target_format}.", param="target_format"
    )


def conversions_from(info: ModelInfo) -> tuple[Conversion, ...]:
    """Return the conversion to each target format, with the reason if it is not possible.

    Reads the model's configuration, imports no runtime; blocks for some 50 ms the first time.
    """
    return tuple(_conversion(info, target) for target in TARGETS)


def check(info: ModelInfo, target_format: str, quantization: str) -> str:
    """Return the quantization to use: the given one, or the default if empty.

    Raises UnsupportedCapability with the reason if the conversion is not possible.
    """
    if target_format not in _CHOICES:
        raise UnsupportedCapability(
            f"{target_format!r} is not a target format; choose one of {', '.join(TARGETS)}.",
            param="target_format",
        )
    conversion = _conversion(info, target_format)
    wanted = quantization or (conversion.quantizations[0] if conversion.quantizations else "")
    reason = conversion.reason
    if not reason and wanted not in conversion.quantizations:
        reason = f"{wanted!r} is not one of {', '.join(conversion.quantizations)}"
    if reason:
        raise UnsupportedCapability(
            f"{info.name} cannot be converted to {target_format}: {reason}.",
            param="quantization" if conversion.is_possible else "target_format",
        )
    return wanted


def _conversion(info: ModelInfo, target: str) -> Conversion:
    choices = _choices(info, target)
    return Conversion(target, choices, _impossible_reason(info, target, choices))


def _choices(info: ModelInfo, target: str) -> tuple[str, ...]:
    """Return the quantizations that the last step supports for the model, the default first."""
    choices = _CHOICES[target]
    if target == "onnx" and info.format != "gguf" and not _last_step_reason(info, target, ""):
        choices = tuple(each for each in choices if not _last_step_reason(info, target, each))
    if target == "safetensors" and info.format != "gguf":
        return (ORIGINAL, *choices)
    keeps_blocks = (
        info.format == "gguf"
        and target == "mlx"
        and info.quantization in MLX_BLOCKS
        and not _edge_reason(info, ("gguf", "mlx"), _BLOCKS_EDGE)
    )
    if not keeps_blocks:
        return choices
    # The other choices take another route.
    return (ORIGINAL,) if _route_reason(info, plan("gguf", "mlx")) else (ORIGINAL, *choices)


def _last_step_reason(info: ModelInfo, target: str, quantization: str) -> str:
    return step_reason(info, "safetensors", target, quantization)


def _impossible_reason(info: ModelInfo, target: str, choices: tuple[str, ...]) -> str:
    try:
        route = plan(info.format, target)
    except UnsupportedCapability as error:
        return error.message.removesuffix(".")
    is_folder = info.format in ("safetensors", "pytorch")
    if is_folder and info.quantization not in (*FULL_PRECISION, "f64", "mixed", ""):
        return f"its weights are already quantized ({info.quantization})"
    has_head = Capability.COMPLETION in info.capabilities
    if not has_head and route[-1] != "safetensors" and route != ("gguf", "gguf"):
        return "only models that generate text can be converted to it"
    return "" if choices == (ORIGINAL,) else _route_reason(info, route)


def _route_reason(info: ModelInfo, route: tuple[str, ...]) -> str:
    reasons = (_edge_reason(info, pair, _EDGES[pair]) for pair in pairwise(route))
    return next((reason for reason in reasons if reason), "")


def _edge_reason(info: ModelInfo, pair: tuple[str, str], edge: _Edge) -> str:
    if edge.architectures and info.architecture not in edge.architectures:
        return f"the conversion does not support the architecture {info.architecture!r}"
    missing = [name for name in edge.packages if find_spec(name) is None]
    if missing:
        return f"it needs the packages {', '.join(missing)}; install the extra `torch`"
    return step_reason(info, *pair)
