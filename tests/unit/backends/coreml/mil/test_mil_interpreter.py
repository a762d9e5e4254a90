"""The reference runtime against numpy, on programs that coremltools' own builder writes."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.coreml.mil.interpreter import MilInterpreter
from backends.coreml.mil.weights import decompress
from backends.coreml.mil.wire import WireError
from backends.coreml.spec import MANIFEST, read_spec
from core.errors import BrokenModel

ct = pytest.importorskip("coremltools")
pytest.importorskip("torch")

X: NDArray[np.float32] = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)


def save(program: Any, folder: Path, **options: Any) -> Path:
    """Write a program in float32 as a package; return its manifest."""
    options.setdefault("compute_precision", ct.precision.FLOAT32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            **options,
        )
        model.save(str(folder / "tiny.mlpackage"))
    return folder / "tiny.mlpackage" / MANIFEST


def built(folder: Path, build: Callable[[Any, Any], Any], shape: tuple[int, ...] = (3, 4)) -> Path:
    """Write a program of one float input."""
    from coremltools.converters.mil.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        return build(mb, x)

    return save(program, folder)


def computed(manifest: Path, x: NDArray[np.float32] = X) -> list[NDArray[np.float32]]:
    """Run a program; return its outputs in their order."""
    spec = read_spec(manifest)
    outputs = MilInterpreter(spec).predict({next(iter(spec.inputs)): x})
    return [outputs[name] for name in spec.outputs]


def softmax(x: NDArray[np.float32]) -> NDArray[Any]:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


CASES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[NDArray[np.float32]], Any]]] = {
    "matmul": (
        lambda mb, x: mb.matmul(x=x, y=X, transpose_y=True),
        lambda x: x @ X.T,
    ),
    "linear": (
        lambda mb, x: mb.linear(x=x, weight=X, bias=X[:, 0]),
        lambda x: x @ X.T + X[:, 0],
    ),
    "softmax": (lambda mb, x: mb.softmax(x=x, axis=-1), softmax),
    "layer_norm": (
        lambda mb, x: mb.layer_norm(x=x, axes=[-1], epsilon=1e-5),
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
    ),
    "rms": (
        lambda mb, x: mb.mul(
            x=x,
            y=mb.rsqrt(
                x=mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True), epsilon=1e-5
            ),
        ),
        lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5),
    ),
    "shapes": (
        lambda mb, x: mb.squeeze(
            x=mb.expand_dims(
                x=mb.transpose(x=mb.reshape(x=x, shape=[2, 6]), perm=[1, 0]), axes=[1]
            ),
            axes=[1],
        ),
        lambda x: x.reshape(2, 6).T,
    ),
    "slices": (
        lambda mb, x: mb.slice_by_index(
            x=x, begin=[0, 1], end=[0, 4], stride=[1, 2], begin_mask=[True, False],
            end_mask=[True, False],
        ),
        lambda x: x[:, 1:4:2],
    ),
    "select": (
        lambda mb, x: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=mb.exp(x=x)),
        lambda x: np.where(x > 0, x, np.exp(x)),
    ),
    "concat": (lambda mb, x: mb.concat(values=[x, x], axis=1), lambda x: np.hstack([x, x])),
    "gather": (
        lambda mb, x: mb.gather(x=x, indices=np.array([2, -3], np.int32), axis=0),
        lambda x: x[[2, 0]],
    ),
    "update": (
        lambda mb, x: mb.slice_update(x=x, update=X[:1] * 0, begin=[1, 0], end=[2, 4]),
        lambda x: np.vstack([x[:1], x[:1] * 0, x[2:]]),
    ),
    "tanh_gelu": (
        lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operation_computes_what_numpy_does(tmp_path: Path, name: str) -> None:
    build, expected = CASES[name]
    (found,) = computed(built(tmp_path, build))
    np.testing.assert_allclose(found, expected(X), rtol=1e-5, atol=1e-6)


def test_an_input_that_is_updated_stays_what_it_was(tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> Any:
        doubled = mb.add(x=x, y=x)
        changed = mb.slice_update(x=doubled, update=X[:1] * 0, begin=[0, 0], end=[1, 4])
        return mb.sub(x=doubled, y=changed)

    (found,) = computed(built(tmp_path, build))
    np.testing.assert_allclose(found, np.vstack([2 * X[:1], 0 * X[1:]]))


def test_an_unknown_operation_is_named(tmp_path: Path) -> None:
    manifest = built(tmp_path, lambda mb, x: mb.cumsum(x=x, axis=0))
    with pytest.raises(BrokenModel, match="cumsum"):
        MilInterpreter(read_spec(manifest))


def test_states_are_kept_apart(tmp_path: Path) -> None:
    import torch

    class Sum(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(3, 4))

        def forward(self, x: Any) -> Any:
            self.total.add_(x)
            return self.total + 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Sum().eval(), torch.zeros(3, 4), check_trace=False)
    tensor = ct.TensorType(shape=(3, 4), dtype=np.float16)
    manifest = save(
        traced,
        tmp_path,
        inputs=[ct.TensorType(shape=(3, 4), name="x")],
        states=[ct.StateType(wrapped_type=tensor, name="total")],
    )
    spec = read_spec(manifest)
    model = MilInterpreter(spec)
    (output,) = spec.outputs
    first, second = model.make_state(), model.make_state()
    model.predict({"x": X}, first)
    copy = model.copy_state(first)
    np.testing.assert_allclose(model.predict({"x": X}, first)[output], 2 * X, rtol=1e-3)
    np.testing.assert_allclose(model.predict({"x": X}, second)[output], X, rtol=1e-3)
    np.testing.assert_allclose(model.predict({"x": 2 * X}, copy)[output], 3 * X, rtol=1e-3)


def big(mb: Any, x: Any) -> Any:
    """Use a weight that is large enough for the weight file."""
    return mb.matmul(x=x, y=np.ones((4, 64), np.float32))


def test_weights_come_from_the_weight_file(tmp_path: Path) -> None:
    (found,) = computed(built(tmp_path, big))
    np.testing.assert_allclose(found, np.repeat(X.sum(1, keepdims=True), 64, 1), atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "missing", "mark", "pointer", "outside"])
def test_damaged_weights_are_broken(tmp_path: Path, damage: str) -> None:
    spec = read_spec(built(tmp_path, big))
    (path,) = (file for file in spec.files if file.name == "weight.bin")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "mark":
        path.write_bytes(data.replace(b"\xef\xbe\xad\xde", b"\0\0\0\0"))
    elif damage == "pointer":
        path.write_bytes(data[:80] + b"\xff" * 8 + data[88:])
    else:
        content = spec.model_file.read_bytes()
        changed = content.replace(
            b"@model_path/weights/weight.bin", b"@model_path/../../../../secret"
        )
        spec.model_file.write_bytes(changed)
    with pytest.raises(BrokenModel):
        MilInterpreter(spec)


def test_compressed_weights_are_restored() -> None:
    scale = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    values = {"data": np.ones((2, 4), np.int8), "scale": scale, "offset": np.zeros((2, 2), np.int8)}
    dense = decompress("constexpr_blockwise_shift_scale", values)
    assert dense.tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    lut = np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float32).reshape(2, 1, 4, 1)
    indices = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], np.uint8).reshape(6, 2)
    found = decompress("constexpr_lut_to_dense", {"indices": indices, "lut": lut})
    assert found.tolist() == [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]
    vectors = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    pairs = np.array([[0, 1]], np.uint8)
    along = decompress(
        "constexpr_lut_to_dense", {"indices": pairs, "lut": vectors, "vector_axis": np.int32(0)}
    )
    assert along.tolist() == [[0, 3], [1, 4], [2, 5]]
    affine = {
        "quantized_data": np.array([[3, 5]], np.uint8),
        "zero_point": np.uint8(1),
        "scale": np.float32(0.5),
        "axis": np.int32(0),
    }
    assert decompress("constexpr_affine_dequantize", affine).tolist() == [[1, 2]]


def test_compressed_weights_that_do_not_fit_are_refused() -> None:
    values = {"data": np.ones((2, 5), np.int8), "scale": np.ones((2, 2), np.float32)}
    with pytest.raises(WireError, match="does not fit"):
        decompress("constexpr_blockwise_shift_scale", values)
    with pytest.raises(WireError, match="constexpr_other"):
        decompress("constexpr_other", {})
