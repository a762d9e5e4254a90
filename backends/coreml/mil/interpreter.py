"""Interpreter for Core ML programs (MIL): runs every operation on PyTorch, on any system."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.coreml.mil.ops import Compute, Tensor, index_of, operations
from backends.coreml.mil.program import Constant, Operation, Program, read_program
from backends.coreml.mil.schedule import STORES, Name, Step, schedule
from backends.coreml.mil.weights import WeightReader, decompress
from backends.coreml.mil.wire import WireError
from backends.coreml.spec import CoremlSpec, broken

State: TypeAlias = dict[str, Any]

_FLOATS = ("fp16", "fp32", "fp64")
_CASTS = {
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "uint16": "int32",
    "bool": "bool",
}
# Arguments that configure an operation; as constants, Python numbers are faster than tensors.
_PARAMETERS = frozenset({
    "alpha", "axes", "axis", "begin", "begin_mask", "beta", "end", "end_mask", "epsilon",
    "keep_dims", "num_splits", "perm", "reps", "shape", "size", "split_sizes", "squeeze_mask",
    "stride", "transpose_x", "transpose_y",
})  # fmt: skip
_KNOWN = frozenset({"read_state", "slice_update", "cast", *STORES})


class MilInterpreter:
    """A loaded program with the interface of coremltools' `MLModel`: `predict`, `make_state`.

    `precision` "f32" computes every float in float32; "native" uses the program's types, which
    reproduces overflows of float16.  Used from one thread at a time.
    """

    def __init__(
        self, spec: CoremlSpec, precision: Literal["f32", "native"] = "f32", *, threads: int = 1
    ) -> None:
        """Load all weights; blocks.  Raises BrokenModel, also for unsupported operations."""
        import torch

        torch.set_num_threads(threads)
        self._spec = spec
        self._float = torch.float32 if precision == "f32" else None
        program = read_program(spec)
        table = operations()
        self._refuse_unknown(program, table)
        self._constants: dict[str, Any] = {}
        try:
            self._load_constants(program)
            self._steps = [
                self._plan(operation, table)
                for operation in program.operations
                if operation.type != "const" and not operation.type.startswith("constexpr_")
            ]
        except WireError as problem:
            raise broken(spec.package, str(problem)) from problem
        self._outputs = program.outputs
        schedule(self._steps, program.outputs)

    def _refuse_unknown(self, program: Program, table: Mapping[str, Compute]) -> None:
        unknown = {
            operation.type
            for operation in program.operations
            if operation.type not in table
            and operation.type not in _KNOWN
            and operation.type != "const"
            and not operation.type.startswith("constexpr_")
        }
        if unknown:
            raise broken(
                self._spec.package,
                f"the reference runtime does not support {', '.join(sorted(unknown))}",
            )

    def _load_constants(self, program: Program) -> None:
        """Load each constant once; free those that only decompression needs."""
        reader = WeightReader(self._spec)
        waiting: dict[str, Constant] = {}
        for operation in program.operations:
            if operation.type == "const":
                (value,) = operation.arguments.get("val", (None,))
                if not isinstance(value, Constant) or not operation.outputs:
                    raise WireError("a constant has no value")
                waiting[operation.outputs[0]] = value
        compressed: set[str] = set()
        for operation in program.operations:
            if operation.type.startswith("constexpr_"):
                values = {
                    name: self._compressed(reader, waiting, compressed, arguments)
                    for name, arguments in operation.arguments.items()
                }
                dense = decompress(operation.type, values)
                self._constants[operation.outputs[0]] = self._tensor(dense)
        for name, constant in waiting.items():
            if name not in compressed:
                self._constants[name] = self._tensor(reader.array(constant))

    def _compressed(
        self,
        reader: WeightReader,
        waiting: Mapping[str, Constant],
        compressed: set[str],
        arguments: tuple[Any, ...],
    ) -> Any:
        (argument,) = arguments
        if isinstance(argument, Constant):
            return reader.array(argument)
        if argument in waiting:
            compressed.add(argument)
            return reader.array(waiting[argument])
        if argument in self._constants:
            return self._constants[argument].numpy()
        raise WireError(f"a compressed weight needs {argument[:100]!r}, which is not a constant")

    def _tensor(self, value: Any) -> Any:
        """Convert an array to a tensor of the computing type; strings are returned unchanged."""
        import torch

        if isinstance(value, str):
            return value
        if value.dtype == np.uint16:
            value = value.astype(np.int32)
        tensor = torch.from_numpy(value if value.flags.writeable else value.copy())
        if self._float is not None and tensor.is_floating_point():
            return tensor.to(self._float)
        return tensor

    def _plan(self, operation: Operation, table: Mapping[str, Compute]) -> Step:
        fixed: dict[str, Any] = {}
        names: list[tuple[str, str]] = []
        lists: list[tuple[str, tuple[Any, ...]]] = []
        for key, arguments in operation.arguments.items():
            values = tuple(self._argument(argument) for argument in arguments)
            if key == "values":
                lists.append((key, values))
            elif len(values) != 1:
                raise WireError(f"{operation.type} has {len(values)} values for {key[:100]!r}")
            elif isinstance(values[0], Name):
                names.append((key, values[0].name))
            else:
                fixed[key] = _parameter(key, operation.type, values[0])
        return Step(
            operation.type,
            fixed,
            tuple(names),
            tuple(lists),
            operation.outputs,
            table.get(operation.type),
        )

    def _argument(self, argument: "str | Constant") -> Any:
        if isinstance(argument, Constant):
            return self._tensor(WeightReader(self._spec).array(argument))
        return self._constants[argument] if argument in self._constants else Name(argument)

    def make_state(self) -> State:
        """Return an empty state."""
        import torch

        state: State = {}
        for name, feature in self._spec.states.items():
            kind = self._float or getattr(torch, feature.dtype or "float16")
            state[name] = torch.zeros(feature.shape, dtype=kind)
        return state

    def copy_state(self, state: State) -> State:
        """Return an independent copy of a state."""
        return {name: tensor.clone() for name, tensor in state.items()}

    def predict(
        self, data: Mapping[str, NDArray[Any]], state: State | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Run the program; updates `state` in place.  Returns float32 arrays by output name.

        Raises ValueError, RuntimeError, KeyError, IndexError or TypeError if a damaged program
        cannot run.
        """
        import torch

        values: dict[str, Any] = {}
        for name, feature in self._spec.inputs.items():
            if name in data:
                values[name] = self._tensor(np.array(data[name], feature.dtype or "float32"))
        with torch.inference_mode():
            for step in self._steps:
                self._run(step, values, state if state is not None else {})
            missing = {name: self._constants[name] for name in self._outputs if name not in values}
            return {name: (values | missing)[name].float().numpy().copy() for name in self._outputs}

    def _run(self, step: Step, values: dict[str, Any], state: State) -> None:
        arguments = dict(step.fixed)
        for key, name in step.names:
            arguments[key] = values[name] if name in values else state[name]
        for key, items in step.lists:
            arguments[key] = [values[i.name] if isinstance(i, Name) else i for i in items]
        if step.compute is not None:
            result = step.compute(arguments)
        elif step.type == "cast":
            result = self._cast(arguments)
        elif step.type == "slice_update":
            result = _slice_update(arguments, step.is_in_place)
        elif step.type == "read_state":
            result = arguments["input"]
        else:
            target, value = STORES[step.type]
            result = state[dict(step.names)[target]] = arguments[value]
        if isinstance(result, tuple):
            values.update(zip(step.outputs, result, strict=True))
        elif step.outputs:
            values[step.outputs[0]] = result
        for name in step.done:
            values.pop(name, None)

    def _cast(self, arguments: Mapping[str, Any]) -> Tensor:
        import torch

        kind = arguments["dtype"]
        if self._float is not None and kind in _FLOATS:
            return arguments["x"].to(self._float)
        return arguments["x"].to(getattr(torch, _CASTS[kind]))


def _parameter(key: str, operation: str, value: Any) -> Any:
    is_data = operation == "layer_norm" and key == "beta"
    return value.tolist() if key in _PARAMETERS and not is_data and value.ndim < 2 else value


def _slice_update(arguments: Mapping[str, Any], is_in_place: bool) -> Tensor:
    x = arguments["x"] if is_in_place else arguments["x"].clone()
    x[index_of(arguments, x.ndim)] = arguments["update"]
    return x
