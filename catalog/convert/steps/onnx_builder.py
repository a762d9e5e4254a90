"""Runs onnxruntime-genai's builder so that it never holds more than a piece of a weight.

The builder collects all weights in f32 in one message before it quantizes them.  Here three of its
methods are replaced: weights stay views of the mapped source, and are joined, cast and quantized
when the data file is written.  Its results are the same to the bit; docs/upgrading.md lists what is
relied on.
"""

import contextlib
import importlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from catalog.convert.steps.onnx_pieces import Pieces, QuantizedWeight, Stacked, cast_pieces
from core.errors import UnsupportedCapability

_DOMAIN = "com.microsoft"


def run_builder(arguments: Sequence[str], *, is_streamed: bool = True) -> None:
    """Run the builder's command line in this process.

    Not `is_streamed` leaves the builder as it is, which takes several times the model's memory.
    Raises NotImplementedError for architectures that it does not support.
    """
    before = sys.argv
    sys.argv = ["builder", *arguments]
    try:
        with contextlib.ExitStack() as stack:
            if is_streamed:
                stack.enter_context(_streamed_weights())
            stack.enter_context(contextlib.suppress(SystemExit))
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    finally:
        sys.argv = before


@contextlib.contextmanager
def _streamed_weights() -> Iterator[None]:
    """Replace the methods of the builder's models that hold whole weights."""
    # The package puts its own folder on the path; the builder imports its modules from there.
    importlib.import_module("onnxruntime_genai.models")
    model_class = importlib.import_module("builders.base").Model
    replaced = {
        "make_initializer": _with_views(model_class.make_initializer),
        "make_packed_matmul_float_class": _stacked_matmul,
        "to_nbits": _quantized_model,
    }
    kept = {name: getattr(model_class, name) for name in replaced}
    for name, method in replaced.items():
        setattr(model_class, name, method)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(model_class, name, method)


def _with_views(original: Any) -> Any:
    """Return `make_initializer`, with matrices that are cast while they are written."""
    import onnx_ir as ir
    import torch
    from onnx_ir.tensor_adapters import to_torch_dtype

    def make_initializer(
        self: Any, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False
    ) -> None:
        original(self, tensor, name, to=to, raw=raw)
        is_matrix = isinstance(tensor, torch.Tensor) and tensor.ndim == 2
        if to is None or raw or not (is_matrix or isinstance(tensor, Stacked)):
            return
        weight = tensor if isinstance(tensor, Stacked) else Stacked.of(tensor)
        dtype = to_torch_dtype(to)
        pieces = Pieces(weight.shape, to.numpy(), lambda: cast_pieces(weight, dtype))
        value = self.model.graph.initializers[name]
        value.const_value = ir.LazyTensor(
            lambda: pieces,  # type: ignore[arg-type,return-value]
            dtype=to,
            shape=ir.Shape(weight.shape),
            name=name,
        )
        value.meta[_WEIGHT] = weight

    return make_initializer


# Where a value of the graph has its `Stacked`.
_WEIGHT = "impetus_weight"


def _stacked_matmul(_self: Any, query: Any, key: Any, value: Any, **_: Any) -> Any:
    """Join three projections without a copy of their weights."""
    return SimpleNamespace(weight=Stacked([query.weight, key.weight, value.weight]))


def _quantized_model(self: Any) -> Any:
    """Return the builder's graph with quantized products, as MatMulNBitsQuantizer makes them.

    Raises UnsupportedCapability for settings of the builder that are never given to it here.
    """
    import onnx_ir as ir
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    settings = self.quant_attrs
    is_known = self.quantization_algo == "default" and not self.int4_customized_weight_config
    if not is_known or settings["use_qdq"] or not settings["is_symmetric"]:
        raise UnsupportedCapability(
            "onnxruntime-genai's builder wants another kind of quantization for this model; "
            "choose f32.",
            param="quantization",
        )
    bits, block_size = settings["bits"], settings["matmul_block_size"]
    quantizer = DefaultWeightOnlyQuantizer(
        DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    )
    graph = self.model.graph
    for node in list(graph):
        matrix = node.inputs[1] if node.op_type == "MatMul" else None
        if matrix is None or _WEIGHT not in matrix.meta:
            continue
        if node.name in settings["nodes_to_exclude"]:
            continue
        weight = QuantizedWeight(
            matrix.meta[_WEIGHT], bits, block_size, quantizer.qbits_block_quant
        )
        packed, scales = _quantized_values(self, matrix.name, weight)
        numbers = {
            "K": weight.weight.shape[0], "N": weight.weight.shape[1],
            "accuracy_level": settings["accuracy_level"], "bits": bits, "block_size": block_size,
        }  # fmt: skip
        node.op_type, node.domain, node.name = "MatMulNBits", _DOMAIN, f"{node.name}_Q{bits}"
        node.resize_inputs(3)
        node.replace_input_with(1, packed)
        node.replace_input_with(2, scales)
        for name, number in numbers.items():
            # The level is optional.
            if number:
                node.attributes[name] = ir.AttrInt64(name, number)
        if not matrix.uses():
            del graph.initializers[matrix.name]
    return self.model


def _quantized_values(self: Any, name: str, weight: QuantizedWeight) -> tuple[Any, Any]:
    """Add the packed values and the scales of a weight to the graph, under the quantizer's names.

    Embeddings that share the output layer's weight already use these names.
    """
    import onnx_ir as ir

    def added(name: str, shape: tuple[int, ...], dtype: Any, pieces: Any) -> Any:
        tensor = Pieces(shape, dtype.numpy(), pieces)
        value = self.make_value(name, dtype, shape)
        value.const_value = ir.LazyTensor(
            lambda: tensor,  # type: ignore[arg-type,return-value]
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
        )
        self.model.graph.register_initializer(value)
        return value

    return (
        added(
            f"{name}_Q{weight.bits}", weight.packed_shape, ir.DataType.UINT8, weight.packed_pieces
        ),
        added(f"{name}_scales", weight.scales_shape, ir.DataType.FLOAT, weight.scales_pieces),
    )
