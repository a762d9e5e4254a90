"""A row fails alone: what its sampling, mask, start or prefix raises ends no other row."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.engine.row_model import RowInput
from backends.engine.row_stepper import RowStepper
from backends.grammar.constraint import TokenMask
from backends.stepper import SequenceSpec, StepOutput
from core.errors import NonFiniteOutput, NoTokenLeft, RequestFailed
from core.types import SamplingParams
from tests.unit.backends.engine.faulty import Panic
from tests.unit.backends.engine.rows.test_row_stepper import FakeModel, Pieces, expected, stepper

BAD, GOOD = 1, 2
BAD_PROMPT, GOOD_PROMPT = (90, 5, 7), tuple(range(20, 60))


class FaultyModel(FakeModel):
    """Computes the logits that it is told for rows that begin with the bad prompt's token."""

    def __init__(self, value: float | None = None, *, is_whole: bool = False) -> None:
        super().__init__(8)
        self._value = value
        self._is_whole = is_whole
        self.opening: BaseException | None = None

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        logits = super().extend(rows)
        for index, row in enumerate(rows):
            if self._value is not None and self.rows[row.row][0] == BAD_PROMPT[0]:
                logits[index, slice(None) if self._is_whole else 3] = self._value
        return logits

    def open_row(self, capacity: int) -> int:
        if self.opening is not None and capacity == len(BAD_PROMPT) + 8:
            raise self.opening
        return super().open_row(capacity)


class Mask:
    """Allows token 3 only; raises where it is told."""

    is_active = True
    problem = ""

    def __init__(self, place: str = "", error: BaseException | None = None) -> None:
        self._place, self._error = place, error

    def apply(self, logits: NDArray[np.float32]) -> None:
        self._may_raise("apply")
        logits[:3] = logits[4:] = -np.inf

    def accept(self, token_id: int) -> None:
        del token_id
        self._may_raise("accept")

    def _may_raise(self, place: str) -> None:
        if self._place == place and self._error is not None:
            raise self._error


def bad_spec(mask: TokenMask | None = None, **sampling: Any) -> SequenceSpec:
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    return SequenceSpec(BAD, BAD_PROMPT, params, 8, mask)


def good_spec() -> SequenceSpec:
    return SequenceSpec(GOOD, GOOD_PROMPT, SamplingParams(temperature=0.0), 8)


def run_both(chosen: RowStepper, spec: SequenceSpec) -> tuple[list[int], list[StepOutput]]:
    """Return the good row's eight tokens, and the bad row's problems."""
    chosen.add(spec)
    chosen.add(good_spec())
    tokens: list[int] = []
    problems: list[StepOutput] = []
    for _ in range(30):
        for output in chosen.step():
            if output.problem is not None:
                problems.append(output)
                chosen.remove(output.sequence_id)
            elif output.sequence_id == GOOD and output.token_id is not None:
                tokens.append(output.token_id)
        if len(tokens) == 8:
            break
    chosen.remove(GOOD)
    return tokens, problems


def check(chosen: RowStepper, spec: SequenceSpec, error: type[Exception]) -> RequestFailed:
    tokens, problems = run_both(chosen, spec)
    assert tokens == expected(GOOD_PROMPT, 8)
    (output,) = problems
    assert (output.sequence_id, output.token_id) == (BAD, None)
    assert type(output.problem) is error
    assert isinstance(output.problem, RequestFailed)
    return output.problem


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"top_logprobs": 2}])
def test_a_row_of_logits_that_are_no_numbers_fails_alone(
    value: float, is_whole: bool, sampling: dict[str, Any]
) -> None:
    model = FaultyModel(value, is_whole=is_whole)
    problem = check(stepper(model), bad_spec(**sampling), NonFiniteOutput)
    assert (problem.status, problem.code) == (500, "non_finite_output")


def test_the_cache_of_a_row_that_failed_is_not_kept() -> None:
    model = FaultyModel(np.nan)
    chosen = stepper(model)
    chosen.add(SequenceSpec(BAD, BAD_PROMPT * 20, SamplingParams(temperature=0.0), 8))
    (output,) = chosen.step()
    assert output.problem is not None
    assert not model.rows


@pytest.mark.parametrize("place", ["apply", "accept"])
@pytest.mark.parametrize("error", [ValueError("no mask"), Panic("no mask"), MemoryError("no mask")])
def test_a_mask_that_raises_fails_its_row_alone(place: str, error: BaseException) -> None:
    problem = check(stepper(FaultyModel()), bad_spec(Mask(place, error)), RequestFailed)
    assert "no mask" in problem.message


def test_a_mask_whose_only_token_is_banned_fails_its_row_alone() -> None:
    spec = bad_spec(Mask(), logit_bias={3: -100.0})
    problem = check(stepper(FaultyModel()), spec, NoTokenLeft)
    assert "No token may come next" in problem.message


@pytest.mark.parametrize("place", ["piece", "is_end"])
def test_a_token_that_cannot_be_read_fails_its_row_alone(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(_: Pieces, token_id: int, **__: Any) -> Any:
        if token_id == 3:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "not this one")
        return b"x" if place == "piece" else False

    monkeypatch.setattr(Pieces, place, fail)
    check(stepper(FaultyModel()), bad_spec(Mask(), top_logprobs=1), RequestFailed)


@pytest.mark.parametrize("error", [MemoryError("no row"), RuntimeError("no row"), Panic("no row")])
def test_a_row_that_cannot_start_fails_alone(error: BaseException) -> None:
    model = FaultyModel()
    model.opening = error
    problem = check(stepper(model), bad_spec(), RequestFailed)
    assert "no row" in problem.message


def test_a_prefix_that_cannot_be_shared_fails_its_row_alone() -> None:
    chosen = stepper(FaultyModel())
    shared = tuple(range(1, 90))
    chosen.add(good_spec())
    chosen.add(SequenceSpec(3, shared, SamplingParams(temperature=0.0), 8))
    chosen.add(SequenceSpec(BAD, (*shared, 7), SamplingParams(temperature=0.0), 8))

    def fail(*_: object) -> None:
        raise ValueError("cannot share")

    chosen._share = fail  # type: ignore[method-assign, assignment]
    outputs = [output for _ in range(10) for output in chosen.step()]
    problems = [output for output in outputs if output.problem is not None]
    assert [output.sequence_id for output in problems] == [BAD]
    for number, prompt in ((GOOD, GOOD_PROMPT), (3, shared)):
        found = [o.token_id for o in outputs if o.sequence_id == number and o.token_id is not None]
        assert found == expected(prompt, len(found))
        assert len(found) > 3


def test_a_row_that_outgrows_the_cache_fails_and_the_next_one_runs() -> None:
    chosen = stepper(FaultyModel(), kv_tokens=48, sequences=1)
    chosen.add(SequenceSpec(BAD, tuple(range(44)), SamplingParams(temperature=0.0), 8))
    chosen.add(good_spec())
    outputs: list[StepOutput] = []
    while not outputs or outputs[-1].problem is None:
        outputs = chosen.step()
    assert outputs[-1].sequence_id == BAD
    assert outputs[-1].problem is not None
    assert "KV cache of 48 tokens" in outputs[-1].problem.message
    found: list[int] = []
    while len(found) < 8:
        found += [o.token_id for o in chosen.step() if o.token_id is not None]
    assert found == expected(GOOD_PROMPT, 8)


@pytest.mark.parametrize("method", ["close_row", "truncate"])
def test_a_row_whose_cache_cannot_be_freed_still_fails_alone(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("the device is busy")

    model = FaultyModel(np.nan)
    monkeypatch.setattr(model, method, fail)
    check(stepper(model), bad_spec(), NonFiniteOutput)


def test_blocks_that_cannot_be_copied_fail_no_request() -> None:
    chosen = stepper(FaultyModel())

    def fail() -> None:
        raise OSError(28, "No space left on device")

    chosen._transfer.copy_if_due = fail  # type: ignore[method-assign]
    chosen.add(good_spec())
    tokens: list[int] = []
    step: Callable[[], list[StepOutput]] = chosen.step
    while len(tokens) < 8:
        tokens += [output.token_id for output in step() if output.token_id is not None]
    assert tokens == expected(GOOD_PROMPT, 8)
