"""Trials of models: what is found wrong, what is forgiven, and what an engine then does."""

import json
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.engine.row_model import RowInput
from backends.engine.trial.checks import (
    TrialTerms,
    affordable_tokens,
    difference,
    rounded_length,
    run_trial,
)
from backends.engine.trial.results import trial_key, tried, try_model
from backends.engine.trial.row_models import LimitedRows, RowModelSubject, limited
from backends.trials import RamTrials, TrialFolder, TrialOptions, TrialResult, TrialRow, tell

VOCABULARY = 48
EXACT = TrialTerms(tolerance=0.01)
WINDOW = 20


class HistoryRows:
    """Rows whose logits depend on their whole history, or on the last `window` tokens of it.

    `faults` are what a runtime may do wrongly.
    """

    vocabulary_size = VOCABULARY
    native_cpu_s = 0.0
    layout = "history"

    def __init__(self, *faults: str, window: int = 1 << 20, noise: float = 0.0) -> None:
        self.max_rows = 8
        self.rows: dict[int, list[int]] = {}
        self.faults = set(faults)
        self.calls: list[list[int]] = []
        self._window, self._noise = window, noise
        self._table = np.random.default_rng(1).normal(size=(VOCABULARY, VOCABULARY))
        self._next = 0

    def open_row(self, capacity: int) -> int:
        assert capacity > 0
        self._next += 1
        self.rows[self._next] = []
        return self._next

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        self.calls.append([len(each.tokens) for each in rows])
        return np.stack([self._extend(each, len(rows)) for each in rows])

    def _extend(self, each: RowInput, count: int) -> NDArray[np.float32]:
        history, before = self.rows[each.row], len(self.rows[each.row])
        history.extend(each.tokens)
        past = before + len(each.tokens)
        if "alone" in self.faults:
            raise RuntimeError("no kernel")
        if "together" in self.faults and count > 1:
            raise RuntimeError("cannot be broadcast")
        is_wrong = (
            ("batch" in self.faults and count > 1)
            or ("crosstalk" in self.faults and len(self.rows) > 1)
            or ("chunk" in self.faults and before and len(each.tokens) > 1)
            or ("cache" in self.faults and before)
            or ("beyond" in self.faults and past > self._window)
            or ("chunk beyond" in self.faults and before and past > self._window + 1)
        )
        logits = self._logits(history[-self._window :][int(bool(is_wrong)) :])
        noise = self._noise * np.random.default_rng(past * 31 + count).normal(size=VOCABULARY)
        return (logits + (noise if count > 1 else 0.0)).astype(np.float32)

    def _logits(self, history: Sequence[int]) -> NDArray[np.float64]:
        if "nan" in self.faults:
            return np.full(VOCABULARY, np.nan)
        weights = np.linspace(0.5, 1.5, len(history))
        found: NDArray[np.float64] = weights @ self._table[list(history)]
        return found

    def truncate(self, row: int, length: int) -> bool:
        if "no cut" in self.faults:
            return False
        del self.rows[row][length + int("cut" in self.faults) :]
        return True

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        if "no copy" in self.faults:
            return None
        row = self.open_row(capacity)
        self.rows[row] = self.rows[source][: length + int("copy" in self.faults)]
        return row

    def read_tokens(self, row: int, start: int, count: int) -> NDArray[np.uint8]:
        return np.array(self.rows[row][start : start + count], np.uint8)

    def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
        self.rows[row].extend(state.tolist())
        return len(state) == count

    def close_row(self, row: int) -> None:
        del self.rows[row]

    def close(self) -> None:
        self.rows.clear()


def trial(model: HistoryRows, terms: TrialTerms = EXACT, **more: Any) -> TrialResult:
    found = run_trial(RowModelSubject(model), terms, **more)
    assert not model.rows
    return found


def flags(result: TrialResult) -> set[str]:
    names = ("is_sound", "has_cache", "has_batches", "has_chunks", "has_reuse")
    return {name for name in names if not getattr(result, name)}


@pytest.mark.parametrize(
    ("faults", "wrong"),
    [
        ((), set()),
        (("no cut", "no copy"), set()),
        (("batch",), {"has_batches"}),
        (("together",), {"has_batches"}),
        (("cut",), {"has_reuse"}),
        (("copy", "no cut"), {"has_reuse"}),
        (("nan",), set()),
    ],
)
def test_what_is_wrong_is_found_and_nothing_else(faults: tuple[str, ...], wrong: set[str]) -> None:
    result = trial(HistoryRows(*faults))
    assert flags(result) == wrong
    assert bool(result.reason) == bool(wrong)


def test_a_model_that_cannot_compute_a_row_is_not_sound() -> None:
    result = trial(HistoryRows("alone"))
    assert flags(result) == {"is_sound"}
    assert "no kernel" in result.reason


def test_a_reference_that_fails_is_not_used() -> None:
    def fails(_: TrialRow) -> Any:
        raise RuntimeError("not here")

    assert trial(HistoryRows(), reference=fails).is_right
    assert flags(trial(HistoryRows("batch"), reference=fails)) == {"has_batches"}


def test_a_wrong_piece_of_a_prompt_is_found_though_single_tokens_are_right() -> None:
    # A reused prefix is continued by a piece as well.
    assert flags(trial(HistoryRows("chunk"))) == {"has_chunks", "has_reuse"}


def test_tokens_that_are_wrong_from_the_second_one_on_are_found() -> None:
    assert "has_cache" in flags(trial(HistoryRows("cache")))


def test_the_runtimes_own_words_are_the_reason() -> None:
    assert "cannot be broadcast" in trial(HistoryRows("together")).reason


@pytest.mark.parametrize("fault", ["beyond", "chunk beyond"])
def test_faults_beyond_the_window_are_found_by_a_longer_prompt(fault: str) -> None:
    reference = HistoryRows(window=WINDOW)
    terms = TrialTerms(0.01, windows=(WINDOW,))
    wanted = RowModelSubject(reference).alone
    model = HistoryRows(fault, window=WINDOW)
    assert not trial(model, terms, reference=wanted).is_right
    assert trial(HistoryRows(fault, window=WINDOW), EXACT, reference=wanted).is_right


def test_a_window_that_a_runtime_ignores_is_found_against_another_runtime() -> None:
    terms = TrialTerms(0.01, windows=(WINDOW,))
    wanted = RowModelSubject(HistoryRows(window=WINDOW)).alone
    result = trial(HistoryRows(), terms, reference=wanted)
    # All that it computes agrees with itself.
    assert flags(result) == {"is_sound"}


def test_a_window_that_takes_too_long_or_exceeds_the_context_is_left_out() -> None:
    for terms in (
        TrialTerms(0.01, windows=(WINDOW,), most_tokens=200),
        TrialTerms(0.01, windows=(WINDOW,), most_length=WINDOW + 5),
    ):
        model = HistoryRows()
        trial(model, terms)
        assert max(max(counts) for counts in model.calls) < WINDOW


def test_a_larger_model_may_compute_fewer_tokens() -> None:
    few, many = (affordable_tokens(count) for count in (7 * 10**9, 10**6))
    assert few < many


def test_noise_of_quantized_weights_is_forgiven_and_a_wrong_row_is_not() -> None:
    rough = TrialTerms(tolerance=0.25)
    assert trial(HistoryRows(noise=0.1), rough).is_right
    assert not trial(HistoryRows(noise=0.1), EXACT).is_right
    assert not trial(HistoryRows("batch", noise=0.1), rough).is_right


def test_a_difference_counts_only_if_it_is_found_twice() -> None:
    class Once(HistoryRows):
        """One expert was chosen differently, by chance."""

        def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
            logits = super().extend(rows)
            return -logits if len(rows) > 1 and 3 in self.calls[-1] and self._flips() else logits

        def _flips(self) -> bool:
            self.flipped = getattr(self, "flipped", 0) + 1
            return self.flipped <= 2

    model = Once()
    assert trial(model).is_right
    assert model.flipped > 2


def test_the_accelerator_is_held_for_each_pass_and_not_between() -> None:
    held: list[int] = []

    @contextmanager
    def hold() -> Any:
        held.append(len(model.calls))
        yield
        assert len(model.calls) == held[-1] + 1

    model = HistoryRows()
    run_trial(RowModelSubject(model, hold), EXACT)
    assert held == list(range(len(model.calls)))


def test_a_difference_leaves_out_what_all_logits_have_in_common() -> None:
    one = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    assert difference(one, one + 3) < 1e-6
    assert difference(one, one * 1.1) == pytest.approx(0.1, abs=1e-3)
    assert difference(one, np.full_like(one, np.nan)) == np.inf
    # Of equal logits, only rounding is left.
    equal = np.full((2, 50), 3.0, np.float32)
    assert difference(equal, equal + np.float32(1e-6) * one) < 0.01
    assert difference(np.zeros_like(one), np.zeros_like(one)) == 0.0


def test_loads_with_nearly_the_same_context_have_the_same_terms() -> None:
    assert [rounded_length(tokens) for tokens in (0, 1, 4095, 4096, 5000)] == [
        1, 1, 2048, 4096, 4096,
    ]  # fmt: skip


class TestLimitedRows:
    def test_limits_that_do_not_help_are_found(self) -> None:
        assert try_model(HistoryRows("batch"), EXACT, nullcontext).has_cache
        # It is wrong as soon as two rows are open, even if they are computed one by one.
        assert not try_model(HistoryRows("crosstalk"), EXACT, nullcontext).has_cache

    def test_a_model_without_faults_is_not_wrapped(self) -> None:
        model = HistoryRows()
        assert limited(model, TrialResult()) is model

    @pytest.mark.parametrize("fault", ["batch", "chunk", "cut", "copy", "together"])
    def test_a_model_with_a_fault_passes_the_trial_once_it_is_limited(self, fault: str) -> None:
        model = HistoryRows(fault)
        rows = limited(model, trial(model))
        assert isinstance(rows, LimitedRows)
        assert run_trial(RowModelSubject(rows), EXACT).is_right
        assert not model.rows

    def test_rows_are_computed_one_by_one_and_prompts_still_in_pieces(self) -> None:
        model = HistoryRows()
        rows = limited(model, TrialResult(has_batches=False, reason="wrong"))
        one, other = rows.open_row(9), rows.open_row(9)
        rows.extend([RowInput(one, (1, 2, 3)), RowInput(other, (4,))])
        rows.extend([RowInput(one, (5, 6)), RowInput(other, (7,))])
        assert model.calls == [[3], [1], [2], [1]]
        assert isinstance(rows, LimitedRows)
        assert rows.layout == "history"

    def test_without_right_reuse_no_cache_is_exported_cut_or_copied(self) -> None:
        model = HistoryRows()
        rows = limited(model, TrialResult(has_reuse=False, reason="wrong"))
        assert isinstance(rows, LimitedRows)
        row = rows.open_row(9)
        rows.extend([RowInput(row, (1, 2, 3))])
        assert rows.layout is None
        assert rows.copy_row(row, 2, 9) is None
        assert not rows.truncate(row, 2)
        assert rows.truncate(row, 3)


class TestResults:
    def test_a_trial_is_made_once_for_a_key(self) -> None:
        options, made = TrialOptions(RamTrials()), []

        def run() -> TrialResult:
            made.append(1)
            return TrialResult(has_batches=False, reason="they differ")

        found = [tried("m", "key", options, run) for _ in range(3)]
        assert len(made) == 1
        assert found == [found[0]] * 3

    def test_a_folder_keeps_results_and_survives_another_process(self, tmp_path: Path) -> None:
        result = TrialResult(has_reuse=False, reason='the "cache" differs ä', choice="separate")
        TrialFolder(tmp_path / "trials").put("a", result)
        assert TrialFolder(tmp_path / "trials").get("a") == result
        assert TrialFolder(tmp_path / "trials").get("b") is None

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b'{"is_sound": true}',
            b"[" * 4000,
            b"\xff" * 40,
            b" " * 9000,
            json.dumps(
                {"is_sound": 1, "has_cache": True, "has_batches": True, "has_chunks": True,
                 "has_reuse": True, "reason": "", "choice": ""}
            ).encode(),
        ],
    )  # fmt: skip
    def test_a_damaged_result_is_unknown_and_replaced(self, tmp_path: Path, content: bytes) -> None:
        folder = TrialFolder(tmp_path)
        (tmp_path / "key.json").write_bytes(content)
        assert folder.get("key") is None
        folder.put("key", TrialResult())
        assert folder.get("key") == TrialResult()

    def test_the_number_of_files_is_bounded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("backends.trials._MOST_RESULTS", 3)
        folder, ram = TrialFolder(tmp_path), RamTrials()
        for number in range(6):
            folder.put(str(number), TrialResult())
            ram.put(str(number), TrialResult())
        assert len(list(tmp_path.iterdir())) == 3
        assert folder.get("5") is not None
        assert [ram.get(str(number)) is not None for number in range(6)] == [False] * 3 + [True] * 3

    def test_a_folder_that_cannot_be_written_costs_only_another_trial(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        folder = TrialFolder(tmp_path / "file" / "trials")
        folder.put("a", TrialResult())
        assert folder.get("a") is None

    def test_another_file_version_or_setting_is_another_key(self, tmp_path: Path) -> None:
        path = tmp_path / "model"
        path.write_bytes(b"1")
        keys = {
            trial_key([path], ["numpy"], "f32"),
            trial_key([path], ["numpy"], "q8"),
            trial_key([path], ["numpy", "no-such-package"], "f32"),
        }
        assert keys == keys | {trial_key([path], ["numpy"], "f32")}
        path.write_bytes(b"12")
        assert len(keys | {trial_key([path], ["numpy"], "f32")}) == 4

    def test_each_limitation_is_told_with_its_reason(self) -> None:
        result = TrialResult(has_batches=False, has_reuse=False, reason="they differ by 40%")
        found = tell("m", result)
        assert len(found) == 2
        assert all("they differ by 40%" in text for text in found)
        assert tell("m", TrialResult()) == ()


def test_rows_tell_the_lengths_after_which_logits_are_compared() -> None:
    row = TrialRow((1, 2, 3), (4, 5))
    assert list(row.lengths) == [3, 4, 5]
    assert row.tokens == (1, 2, 3, 4, 5)
