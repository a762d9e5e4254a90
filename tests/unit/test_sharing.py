"""Which tests run in one process because they share an engine or a server."""

from collections import OrderedDict
from pathlib import Path

import pytest

from tests import conftest
from tests.conftest import sharing, start_long_first

TESTS = Path(__file__).resolve().parents[1]


def test_files_that_are_named_exist() -> None:
    for name in conftest._SERVERS:
        assert list((TESTS / "integration").rglob(f"test_{name}.py"))
    for name in (*conftest._BY_VARIANT, *conftest._ALONE):
        assert list((TESTS / "contract").rglob(f"test_{name}.py"))


@pytest.mark.parametrize(
    ("nodeid", "shared"),
    [
        ("tests/unit/core/test_units.py::test_a[gguf]", "tests/unit/core/test_units.py"),
        ("tests/integration/test_chat.py::test_a", "shared server"),
        ("tests/integration/faults/test_faults.py::test_a", "shared server"),
        ("tests/integration/test_turns.py::test_a", "tests/integration/test_turns.py"),
        ("tests/contract/test_backend.py::test_a[gguf-f32]", "gguf-f32"),
        ("tests/contract/test_backend.py::test_a[gguf--1]", "gguf"),
        ("tests/contract/test_tokens.py::test_a[2-mlx-npz]", "mlx-npz"),
        ("tests/contract/test_resume.py::test_a[plain]", "tests/contract/test_gguf.py"),
        ("tests/contract/test_gguf.py::test_a", "tests/contract/test_gguf.py"),
        ("tests/contract/test_close.py::test_a[x]", "tests/contract/test_close.py::test_a[x]"),
        ("tests/contract/zoo/test_zoo.py::test_a[x]", "tests/contract/zoo/test_zoo.py::test_a[x]"),
    ],
)
def test_what_a_test_shares(nodeid: str, shared: str) -> None:
    assert sharing(nodeid) == shared


def test_long_groups_start_before_others_in_their_own_order() -> None:
    conversions = [f"tests/contract/conversion/test_conversion.py::test_{each}" for each in "ab"]
    queue = OrderedDict.fromkeys(["tests/contract/test_mlx.py", *conversions, "gguf", "coreml"])
    start_long_first(queue)
    assert list(queue) == [*conversions, "coreml", "tests/contract/test_mlx.py", "gguf"]
