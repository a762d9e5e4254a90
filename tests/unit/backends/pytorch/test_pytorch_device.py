"""Apple's GPU is used only while PyTorch computes there what it computes on the CPU."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from backends.pytorch import device as devices
from backends.pytorch.device import device, device_problem

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def unknown() -> Iterator[None]:
    device.cache_clear()
    yield
    device.cache_clear()


def test_the_cpu_agrees_with_itself_in_every_type() -> None:
    assert device_problem("cpu") == ""


def wrong_for(dtype: Any, is_wrong: Any) -> Any:
    """Return a product that is wrong for tensors of a type and layout, without any error."""
    right = torch.Tensor.__matmul__

    def product(left: Any, other: Any) -> Any:
        found = right(left, other)
        return found * 1.5 if left.dtype == dtype and is_wrong(left) else found

    return product


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        ("float16", "a product of a transposed matrix in float16 is off by"),
        ("bfloat16", "a product of a transposed matrix in bfloat16 is off by"),
    ],
)
def test_a_layout_that_is_silently_wrong_is_found(
    dtype: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = wrong_for(getattr(torch, dtype), lambda left: left.stride()[-1] != 1)
    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert device_problem("cpu").startswith(reason)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_found(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.functional.linear

    def broken(rows: Any, weights: Any) -> Any:
        return linear(rows, weights) * (value if rows.dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "linear", broken)
    assert device_problem("cpu").startswith("a linear layer in bfloat16 is off by")


def test_an_operator_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("not implemented for MPS")

    calls: list[str] = []

    def attention(*tensors: Any, **options: Any) -> Any:
        calls.append(str(tensors[0].dtype))
        return missing() if len(calls) == 2 else known(*tensors, **options)

    known = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    found = device_problem("cpu")
    assert found == "causal attention in float32 failed (not implemented for MPS)"


@pytest.mark.parametrize(("problem", "chosen"), [("", "mps"), ("a product is off by 1", "cpu")])
def test_the_gpu_is_tried_once_and_used_if_it_is_right(
    problem: str,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[str] = []

    def problem_of(name: str) -> str:
        tried.append(name)
        return problem

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices, "device_problem", problem_of)
    assert [device(), device()] == [chosen] * 2
    assert tried == ["mps"]
    assert [problem in record.message for record in caplog.records] == [True] * bool(problem)


def test_without_metal_models_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device() == "cpu"


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Metal is on macOS only")
def test_this_macs_gpu_computes_rightly() -> None:
    assert device_problem("mps") == ""
