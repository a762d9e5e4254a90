"""Says how the tensors in a Hugging Face folder become the model's weights."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from backends.hf.config import HfFolder
from backends.hf.fit import TensorShape
from backends.hf.header import SafetensorsHeader, TensorEntry, broken, read_bytes
from backends.hf.names import model_names
from backends.hf.packed import PackedFinder, PackedWeight, StoredTensor
from backends.hf.quantization import declared_quantization, quantization_beside, read_scheme

_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
# Statistics of activations and of the KV cache, which weights do not need.
_UNUSED = frozenset({
    "activation_scale", "input_amax", "input_global_scale", "input_scale", "input_zero_point",
    "k_scale", "k_zero_point", "output_amax", "output_scale", "output_zero_point", "q_scale",
    "q_zero_point", "qscale_act", "v_scale", "v_zero_point", "weight_format",
})  # fmt: skip
# Endings that only packed weights have, and the tensor that must be beside each.
_PACKED_ENDINGS = (
    ".qweight", ".qzeros", ".weight_packed", ".weight_scale_inv", ".SCB", ".weight.absmax",
    ".weight_scale", ".weight_scale_2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How stored tensors become the model's weights; `plain` ones are used as they are.

    `quantization` is the name for `ModelInfo`, empty if nothing is quantized.
    """

    plain: tuple[str, ...]
    packed: tuple[PackedWeight, ...] = ()
    quantization: str = ""
    method: str = ""

    @property
    def packed_parameters(self) -> int:
        """Number of weights in the packed tensors."""
        return sum(math.prod(each.shape) for each in self.packed)


def weight_layout(
    folder: HfFolder,
    tensors: Mapping[str, StoredTensor],
    read: Callable[[str], bytes] | None = None,
) -> WeightLayout:
    """Return the layout of all of a model's `tensors`; `read` returns the content of a small one.

    Raises BrokenModel for methods that cannot be read, and if the configuration and the tensors
    contradict each other.
    """
    settings = declared_quantization(folder)
    marked = _marked(tensors)
    if settings is None:
        if not marked:
            _refuse_integers(folder, tensors, tensors)
            return WeightLayout(tuple(tensors))
        settings = quantization_beside(folder)
    config = folder.path / "config.json"
    if settings is None:
        raise broken(
            config,
            f"it has no quantization_config, but the weights are quantized ({marked[0][:80]!r}); "
            "download the model's config.json again",
        )
    scheme = read_scheme(folder, settings)
    packed = PackedFinder(config, scheme, tensors, read).find()
    if not packed:
        raise broken(
            config,
            f"its quantization_config says {scheme.label}, but no weight is stored in that form; "
            "remove quantization_config if the weights are not quantized, or download them again",
        )
    used = {name for each in packed for name in each.parts.values()}
    plain = tuple(name for name in tensors if name not in used and not _is_unused(name))
    rest = _marked(plain)
    if rest:
        raise broken(
            config,
            f"its quantization_config says {scheme.label}, but the tensor {rest[0][:80]!r} does "
            "not belong to a weight of that form; download the weights again",
        )
    _refuse_integers(folder, tensors, plain)
    return WeightLayout(plain, packed, scheme.label, scheme.method)


def _is_unused(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in _UNUSED or last.endswith("_amax") or ".weight_observer." in name


def _refuse_integers(
    folder: HfFolder, tensors: Mapping[str, StoredTensor], names: Iterable[str]
) -> None:
    """Raise BrokenModel if a matrix is made of integers that nothing scales."""
    for name in names:
        stored = tensors[name]
        if name.endswith(".weight") and stored.dtype in _INTEGERS and len(stored.shape) > 1:
            raise broken(
                folder.path / "config.json",
                f"the tensor {name[:80]!r} holds {stored.dtype} integers, and nothing says which "
                "weights they stand for; download config.json and the weights again",
            )


def _marked(names: Iterable[str]) -> list[str]:
    """Return the names that only packed weights have."""
    known = set(names)
    return [
        name
        for name in known
        if name.endswith(_PACKED_ENDINGS)
        or (name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in known)
    ]


def dense_tensors(
    layout: WeightLayout, tensors: Mapping[str, StoredTensor]
) -> dict[str, TensorShape]:
    """Return the model's weights by name as they are once loaded: quantized ones as float32."""
    found = {name: TensorShape(tensors[name].dtype, tensors[name].shape) for name in layout.plain}
    return found | {each.name: TensorShape("F32", each.shape) for each in layout.packed}


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights in safetensors files: their entries by the model's names, and their layout.

    `names` maps the stored names to the model's.
    """

    tensors: Mapping[str, TensorEntry]
    names: Mapping[str, str]
    layout: WeightLayout

    @property
    def shapes(self) -> dict[str, TensorShape]:
        """The stored tensors by the model's names."""
        return {name: TensorShape(each.dtype, each.shape) for name, each in self.tensors.items()}


def stored_weights(folder: HfFolder, headers: Sequence[SafetensorsHeader]) -> StoredWeights:
    """Describe the weights of a model's files; reads small tensors.  Raises BrokenModel."""
    stored = {name: entry for each in headers for name, entry in each.tensors.items()}
    paths = {name: each.path for each in headers for name in each.tensors}
    names = model_names(headers[0].path, stored)
    tensors = {new: stored[old] for old, new in names.items()}
    places = {new: paths[old] for old, new in names.items()}

    def read(name: str) -> bytes:
        entry = tensors[name]
        return read_bytes(places[name], entry.nbytes, start=entry.start, count=entry.nbytes)

    return StoredWeights(tensors, names, weight_layout(folder, tensors, read))
