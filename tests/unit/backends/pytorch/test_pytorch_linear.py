"""Linear layers that put the weights on the left for some numbers of rows."""

from typing import Any
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")

from backends.pytorch.linear import speed_up_linear_layers  # noqa: E402

if not torch.backends.mkl.is_available():
    pytest.skip("PyTorch computes without MKL here", allow_module_level=True)

INPUTS, OUTPUTS = 24, 600


def layer(*, bias: bool = True, outputs: int = OUTPUTS) -> Any:
    torch.manual_seed(3)
    return torch.nn.Linear(INPUTS, outputs, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (6,), (7,), (8,), (56,), (57,), (1, 9), (2, 5), (0,)])
def test_outputs_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    plain, fast = layer(bias=bias), layer(bias=bias)
    assert speed_up_linear_layers(fast) == 1
    inputs = torch.randn(*shape, INPUTS)
    with torch.inference_mode():
        found = fast(inputs)
        torch.testing.assert_close(found, plain(inputs))
    assert found.is_contiguous()


@pytest.mark.parametrize(("rows", "times"), [(6, 0), (7, 1), (56, 1), (57, 0)])
def test_weights_are_on_the_left_for_a_few_rows_only(rows: int, times: int) -> None:
    fast = layer()
    speed_up_linear_layers(fast)
    with patch.object(torch, "mm", wraps=torch.mm) as product, torch.inference_mode():
        fast(torch.randn(rows, INPUTS))
    assert product.call_count == times


def test_inputs_need_not_be_contiguous() -> None:
    plain, fast = layer(), layer()
    speed_up_linear_layers(fast)
    inputs = torch.randn(INPUTS, 8).t()
    with torch.inference_mode():
        torch.testing.assert_close(fast(inputs), plain(inputs))


def test_what_is_no_plain_wide_float32_layer_is_left_alone() -> None:
    # A layer whose class may compute something else.
    own = type("Own", (torch.nn.Linear,), {})
    model = torch.nn.ModuleList(
        [
            layer(outputs=512),
            layer().to(torch.bfloat16),
            own(INPUTS, OUTPUTS),
            layer().to("meta"),
        ]
    )
    assert speed_up_linear_layers(model) == 0
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_second_time_changes_nothing() -> None:
    fast = layer()
    assert (speed_up_linear_layers(fast), speed_up_linear_layers(fast)) == (1, 0)
