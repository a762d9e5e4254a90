"""What is decided from the runtimes' checks, and how the decision is worded."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from backends import runtime_check
from backends.hf.config import HfFolder
from backends.hf.fit import Agreement, RuntimeFit, TensorShape
from backends.runtime_check import Excluded, check_runtimes, guess_runtime
from core.errors import BackendUnavailable, BrokenModel

CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "sliding_window": 4096}
TENSORS = {"a": TensorShape("F32", (8, 8))}
FITS = RuntimeFit("", 64)
SAME = Agreement()
WINDOW = Agreement(error=0.4, within_window=1e-6)
OTHER = Agreement(error=0.4, within_window=0.3)


def folder_of(config: dict[str, Any]) -> HfFolder:
    empty: MappingProxyType[str, Any] = MappingProxyType({})
    return HfFolder(Path("/m"), MappingProxyType(config), empty, empty, None, "")


class Runtimes:
    """Stand-ins for the checks of both runtimes and for their comparison."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.mlx: RuntimeFit | Exception = FITS
        self.torch: RuntimeFit | Exception = FITS
        self.agreement = SAME
        self.unread = ""
        monkeypatch.setattr(runtime_check, "check_mlx", lambda *_: self._answer(self.mlx))
        monkeypatch.setattr(runtime_check, "check_torch", lambda *_: self._answer(self.torch))
        monkeypatch.setattr(runtime_check, "compare", lambda _: self.agreement)
        monkeypatch.setattr(runtime_check, "unread_setting", lambda *_: self.unread)

    @staticmethod
    def _answer(found: RuntimeFit | Exception) -> RuntimeFit:
        if isinstance(found, Exception):
            raise found
        return found

    def check(
        self, excluded: Excluded | None = None, tensors: dict[str, TensorShape] = TENSORS
    ) -> runtime_check.CheckedRuntime:
        return check_runtimes(
            folder_of(CONFIG), tensors, excluded or Excluded(), self.asked.append, dense=tensors
        )


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> Runtimes:
    return Runtimes(monkeypatch)


def test_mlx_runs_what_it_computes_right(runtimes: Runtimes) -> None:
    checked = runtimes.check()
    assert (checked.choice.runtime, checked.choice.alternative) == ("mlx", "pytorch")
    assert (checked.parameters, checked.mlx_context) == (64, None)
    assert runtimes.asked == ["mlx", "pytorch"]


def test_pytorch_is_not_asked_about_very_many_tensors_that_mlx_runs(runtimes: Runtimes) -> None:
    many = {str(number): TENSORS["a"] for number in range(20_001)}
    choice = check_runtimes(
        folder_of(CONFIG), many, Excluded(), runtimes.asked.append, dense=TENSORS
    ).choice
    assert (choice.runtime, choice.alternative, runtimes.asked) == ("mlx", "", ["mlx"])
    assert "20001 tensors" in choice.alternative_reason
    runtimes.agreement = OTHER
    choice = check_runtimes(
        folder_of(CONFIG), many, Excluded(), runtimes.asked.append, dense=TENSORS
    ).choice
    assert choice.runtime == "pytorch"


def test_rounding_is_no_difference(runtimes: Runtimes) -> None:
    runtimes.agreement = Agreement(error=5e-5, within_window=1e-5)
    assert runtimes.check().choice.runtime == "mlx"


def test_pytorch_runs_what_mlx_cannot_load(runtimes: Runtimes) -> None:
    runtimes.mlx = RuntimeFit("mlx-lm lacks a bias")
    choice = runtimes.check().choice
    assert (choice.runtime, choice.alternative) == ("pytorch", "")
    assert choice.reason == choice.alternative_reason == "mlx-lm lacks a bias"


@pytest.mark.parametrize("found", [OTHER, Agreement(failure="index out of range")])
def test_pytorch_runs_what_mlx_computes_otherwise(runtimes: Runtimes, found: Agreement) -> None:
    runtimes.agreement = found
    choice = runtimes.check().choice
    assert (choice.runtime, choice.alternative) == ("pytorch", "")
    assert "40.0%" in choice.reason or "index out of range" in choice.reason


def test_mlx_is_an_alternative_up_to_a_window_that_it_ignores(runtimes: Runtimes) -> None:
    runtimes.agreement = WINDOW
    checked = runtimes.check()
    assert (checked.choice.runtime, checked.choice.alternative) == ("pytorch", "mlx")
    assert "sliding window of 4096" in checked.choice.reason
    assert "context is limited" in checked.choice.alternative_reason
    assert checked.mlx_context == 4096


def test_without_pytorch_mlx_runs_up_to_the_window_only(runtimes: Runtimes) -> None:
    runtimes.agreement, runtimes.torch = WINDOW, RuntimeFit("no class")
    checked = runtimes.check()
    assert (checked.choice.runtime, checked.choice.alternative) == ("mlx", "")
    assert checked.mlx_context == 4096


def test_what_neither_runs_right_is_refused_with_both_reasons(runtimes: Runtimes) -> None:
    runtimes.torch = RuntimeFit("no class in transformers")
    runtimes.agreement = OTHER
    with pytest.raises(BrokenModel, match=r"no class in transformers.*40\.0%"):
        runtimes.check()
    runtimes.mlx = RuntimeFit("no module in mlx-lm")
    with pytest.raises(BrokenModel, match=r"no class in transformers.*no module in mlx-lm"):
        runtimes.check()


@pytest.mark.parametrize(("unread", "runtime"), [("", "mlx"), ("it ignores a key", "pytorch")])
def test_what_cannot_be_compared_is_judged_by_the_source(
    runtimes: Runtimes, unread: str, runtime: str
) -> None:
    runtimes.agreement, runtimes.unread = Agreement(unknown="too large"), unread
    assert runtimes.check().choice.runtime == runtime


def test_an_excluded_runtime_is_not_asked(runtimes: Runtimes) -> None:
    choice = runtimes.check(Excluded(mlx="it ended the process")).choice
    assert (choice.runtime, choice.reason) == ("pytorch", "it ended the process")
    assert runtimes.asked == ["pytorch"]
    choice = runtimes.check(Excluded(pytorch="not installed")).choice
    assert (choice.runtime, choice.alternative_reason) == ("mlx", "not installed")


def test_a_runtime_that_cannot_be_imported_says_nothing_about_the_model(runtimes: Runtimes) -> None:
    runtimes.torch = BackendUnavailable("PyTorch cannot be imported")
    assert runtimes.check().choice.runtime == "mlx"
    runtimes.mlx = RuntimeFit("no module in mlx-lm")
    with pytest.raises(BackendUnavailable):
        runtimes.check()


def test_the_guess_imports_nothing_and_follows_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(CONFIG)
    assert guess_runtime(folder, Excluded()).runtime == "mlx"
    assert guess_runtime(folder, Excluded(mlx="not installed")).runtime == "pytorch"
    monkeypatch.setattr(runtime_check, "unread_setting", lambda *_: "it ignores a key")
    assert guess_runtime(folder, Excluded()).runtime == "pytorch"
    assert guess_runtime(folder, Excluded(pytorch="not installed")).runtime == "mlx"


def test_claims_are_checked_before_a_runtime_is_used(runtimes: Runtimes) -> None:
    hostile = folder_of({**CONFIG, "num_hidden_layers": 1_000_000})
    with pytest.raises(BrokenModel, match="num_hidden_layers=1000000"):
        check_runtimes(hostile, TENSORS, Excluded(), runtimes.asked.append, dense=TENSORS)
    assert runtimes.asked == []
