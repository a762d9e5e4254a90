"""Reads the interface and a summary of the weights of an ONNX graph, without native code.

Source of the field numbers: onnx/onnx.proto3 (ModelProto, GraphProto, NodeProto, TensorProto).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backends.onnx.proto import BYTES, VARINT, Field, ProtoReader, open_proto, signed
from backends.onnx.weights import DATA_TYPES, MAX_DIMENSIONS, Weights, add_tensor, check_external
from core.errors import NotThisFormat

_LFS_POINTER = b"version https://git-lfs"
_MAX_GRAPH_DEPTH = 8
# Operators whose attributes K (rows), N (columns) and bits give the size of their weights.
_PACKED = frozenset({"MatMulNBits", "MatMulBnb4"})

Dimension = int | str


@dataclass(frozen=True, slots=True)
class GraphValue:
    """An input or output; `dtype` is empty if it is not a tensor, names are dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """A model's interface and a summary of its weights.

    `consumers` and `producers` are the operator types at each graph input and output.  `shapes`
    are the weights' by name, `weights` the bytes by dtype, `external` the end of what is read
    from each external file.  `packed` counts weights of quantized operators by bits.
    """

    path: Path
    size_bytes: int
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[GraphValue, ...]
    outputs: tuple[GraphValue, ...]
    operators: Mapping[str, int]
    consumers: Mapping[str, frozenset[str]]
    producers: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, int]
    parameters: int
    packed: Mapping[int, int]
    external: Mapping[str, int]

    def input(self, name: str) -> GraphValue | None:
        """Return the input of this name."""
        return next((value for value in self.inputs if value.name == name), None)

    def output(self, name: str) -> GraphValue | None:
        """Return the output of this name."""
        return next((value for value in self.outputs if value.name == name), None)

    @property
    def external_files(self) -> tuple[Path, ...]:
        """The external files that hold weights."""
        return tuple(self.path.parent / location for location in sorted(self.external))


@dataclass(slots=True)
class _GraphScan:
    """What is collected while the graph and its subgraphs are read."""

    opsets: dict[str, int] = field(default_factory=dict)
    inputs: list[GraphValue] = field(default_factory=list)
    outputs: list[GraphValue] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    uses: dict[str, set[str]] = field(default_factory=dict)
    makers: dict[str, str] = field(default_factory=dict)
    packed: Counter[int] = field(default_factory=Counter)
    packed_inputs: set[str] = field(default_factory=set)
    weights: Weights = field(default_factory=Weights)


def read_graph(path: Path) -> OnnxGraph:
    """Read a model's graph without its weights; blocks for 10 ms to a second.

    Raises NotThisFormat for other files; BrokenModel for damaged ones, and for weights that are
    missing or outside the model's folder.
    """
    with open_proto(path) as reader:
        found = _GraphScan()
        ir_version = _walk_model(reader, found)
        for location, end in found.weights.external.items():
            check_external(reader, location, end)
    names = [value.name for value in found.inputs]
    parameters = sum(
        count for name, count in found.weights.elements.items() if name not in found.packed_inputs
    )
    return OnnxGraph(
        path=path,
        size_bytes=reader.size_bytes,
        ir_version=ir_version,
        opsets=found.opsets,
        # Old exports also list their weights as inputs.
        inputs=tuple(value for value in found.inputs if value.name not in found.weights.shapes),
        outputs=tuple(found.outputs),
        operators=found.operators,
        consumers={name: frozenset(found.uses.get(name, ())) for name in names},
        producers={value.name: found.makers.get(value.name, "") for value in found.outputs},
        shapes=found.weights.shapes,
        weights=found.weights.totals,
        parameters=parameters + found.packed.total(),
        packed=found.packed,
        external=found.weights.external,
    )


def _walk_model(reader: ProtoReader, found: _GraphScan) -> int:
    """Read a model's graph and functions; return the IR version."""
    start = reader.beginning(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise reader.broken("it is a Git LFS pointer; its content was not downloaded")
    # Every exporter writes the IR version first, which tells ONNX from other protobuf files.
    if start[:1] != b"\x08":
        raise NotThisFormat(f"{reader.path.name} does not start like an ONNX model")
    fields = reader.fields(0, reader.size_bytes)
    first = next(fields)
    has_graph = False
    for item in fields:
        if item.number == 7 and item.wire_type == BYTES:
            has_graph = True
            _walk_graph(reader, item, found, 0)
        elif item.number == 8 and item.wire_type == BYTES:
            _walk_opset(reader, item, found)
        elif item.number == 25 and item.wire_type == BYTES:
            _walk_function(reader, item, found)
    if not has_graph:
        raise NotThisFormat(f"{reader.path.name} has no ONNX graph")
    return first.value


def _walk_opset(reader: ProtoReader, message: Field, found: _GraphScan) -> None:
    domain, version = "", 0
    for item in reader.fields(message.start, message.end):
        if item.number == 1:
            domain = reader.text(item)
        elif item.number == 2:
            version = item.value
    found.opsets[domain] = version


def _walk_function(reader: ProtoReader, message: Field, found: _GraphScan) -> None:
    for item in reader.fields(message.start, message.end):
        if item.number == 7 and item.wire_type == BYTES:
            _walk_node(reader, item, found, 1)


def _walk_graph(reader: ProtoReader, message: Field, found: _GraphScan, depth: int) -> None:
    if depth > _MAX_GRAPH_DEPTH:
        raise reader.broken(f"its graphs are nested deeper than {_MAX_GRAPH_DEPTH} levels")
    for item in reader.fields(message.start, message.end):
        if item.wire_type != BYTES:
            continue
        if item.number == 1:
            _walk_node(reader, item, found, depth)
        elif item.number == 5:
            add_tensor(reader, item, found.weights)
        elif item.number == 15:
            _walk_sparse(reader, item, found)
        elif item.number == 11 and depth == 0:
            found.inputs.append(_value(reader, item))
        elif item.number == 12 and depth == 0:
            found.outputs.append(_value(reader, item))


def _walk_sparse(reader: ProtoReader, message: Field, found: _GraphScan) -> None:
    for item in reader.fields(message.start, message.end):
        if item.number in (1, 2) and item.wire_type == BYTES:
            add_tensor(reader, item, found.weights)


def _walk_node(reader: ProtoReader, message: Field, found: _GraphScan, depth: int) -> None:
    inputs: list[str] = []
    outputs: list[str] = []
    numbers: dict[str, int] = {}
    operator = ""
    for item in reader.fields(message.start, message.end):
        if item.number == 1:
            inputs.append(reader.text(item))
        elif item.number == 2:
            outputs.append(reader.text(item))
        elif item.number == 4:
            operator = reader.text(item)
        elif item.number == 5 and item.wire_type == BYTES:
            name, value = _walk_attribute(reader, item, found, depth)
            numbers[name] = value
    found.operators[operator] += 1
    for name in inputs:
        found.uses.setdefault(name, set()).add(operator)
    if depth == 0:
        for name in outputs:
            found.makers[name] = operator
    if operator in _PACKED:
        bits = numbers.get("bits", 4)
        found.packed[bits] += max(0, numbers.get("K", 0)) * max(0, numbers.get("N", 0))
        found.packed_inputs.update(inputs[1:])


def _walk_attribute(
    reader: ProtoReader, message: Field, found: _GraphScan, depth: int
) -> tuple[str, int]:
    """Return an attribute's name and integer; collect the tensors and graphs in it."""
    name, number = "", 0
    for item in reader.fields(message.start, message.end):
        if item.number == 1:
            name = reader.text(item)
        elif item.number == 3 and item.wire_type == VARINT:
            number = signed(item.value)
        elif item.wire_type != BYTES:
            continue
        elif item.number in (5, 10):
            add_tensor(reader, item, found.weights)
        elif item.number in (6, 11):
            _walk_graph(reader, item, found, depth + 1)
        elif item.number in (22, 23):
            _walk_sparse(reader, item, found)
    return name, number


def _value(reader: ProtoReader, message: Field) -> GraphValue:
    name, dtype = "", ""
    shape: tuple[Dimension, ...] = ()
    for item in reader.fields(message.start, message.end):
        if item.number == 1:
            name = reader.text(item)
        elif item.number == 2 and item.wire_type == BYTES:
            for kind in reader.fields(item.start, item.end):
                if kind.number == 1 and kind.wire_type == BYTES:
                    dtype, shape = _tensor_type(reader, kind)
    return GraphValue(name, dtype, shape)


def _tensor_type(reader: ProtoReader, message: Field) -> tuple[str, tuple[Dimension, ...]]:
    dtype = ""
    shape: list[Dimension] = []
    for item in reader.fields(message.start, message.end):
        if item.number == 1:
            dtype = DATA_TYPES.get(item.value, ("", 0))[0]
        elif item.number == 2 and item.wire_type == BYTES:
            for dimension in reader.fields(item.start, item.end):
                shape.append(_dimension(reader, dimension))
    if len(shape) > MAX_DIMENSIONS:
        raise reader.broken(
            f"an input or output has {len(shape)} dimensions, more than {MAX_DIMENSIONS}"
        )
    return dtype, tuple(shape)


def _dimension(reader: ProtoReader, message: Field) -> Dimension:
    if message.wire_type != BYTES:
        raise reader.broken("a dimension in it is not a valid size")
    for item in reader.fields(message.start, message.end):
        if item.number == 1:
            return signed(item.value)
        if item.number == 2:
            return reader.text(item)
    return ""
