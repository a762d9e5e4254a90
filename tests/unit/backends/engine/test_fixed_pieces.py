"""A deterministic stepper computes a prompt in the same steps whatever came before it."""

from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.base import EngineOptions
from backends.engine.row_model import RowInput
from backends.engine.row_stepper import RowStepper
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.pieces import PieceRule
from backends.stepper import SequenceSpec
from core.types import SamplingParams

PIECE = 32
VOCABULARY = 8
# A token, the row's length before the step that computed it, the step's tokens, and its rows.
Computed = tuple[int, int, int, int]


class RecordingModel:
    """Rows of tokens that know in which step each was computed, as their rounding would show."""

    vocabulary_size = VOCABULARY

    def __init__(self, max_rows: int, *, can_cut: bool = True) -> None:
        self.max_rows = max_rows
        self.native_cpu_s = 0.0
        self.rows: dict[int, list[Computed]] = {}
        self.last: list[Computed] = []
        self._can_cut = can_cut
        self._opened = 0

    def open_row(self, capacity: int) -> int:
        del capacity
        assert len(self.rows) < self.max_rows
        self._opened += 1
        self.rows[self._opened] = []
        return self._opened

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        logits = np.zeros((len(rows), VOCABULARY), np.float32)
        for index, row in enumerate(rows):
            held = self.rows[row.row]
            start, count = len(held), len(row.tokens)
            held.extend((token, start, count, len(rows)) for token in row.tokens)
            logits[index, sum(token for token, *_ in held) % VOCABULARY] = 1.0
            self.last = list(held)
        return logits

    def truncate(self, row: int, length: int) -> bool:
        if self._can_cut:
            del self.rows[row][length:]
        return self._can_cut

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        if not self._can_cut:
            return None
        row = self.open_row(capacity)
        self.rows[row] = self.rows[source][:length]
        return row

    def close_row(self, row: int) -> None:
        del self.rows[row]

    def close(self) -> None:
        self.rows.clear()


class Pieces:
    def is_end(self, token_id: int) -> bool:
        del token_id
        return False

    def piece(self, token_id: int, *, special: bool) -> bytes:
        del special
        return bytes((token_id,))


def stepper(model: RecordingModel, *, is_fixed: bool = True) -> RowStepper:
    options = EngineOptions(
        max_sequences=4,
        prefill_chunk_tokens=PIECE,
        kv_tokens=512,
        context_tokens=256,
        deterministic=is_fixed,
    )
    return RowStepper(model, Pieces(), options)


def spec(number: int, prompt: Sequence[int], tokens: int) -> SequenceSpec:
    return SequenceSpec(number, tuple(prompt), SamplingParams(temperature=0.0), tokens)


def steps_of(
    chosen: RowStepper, model: RecordingModel, number: int, prompt: Sequence[int], tokens: int
) -> tuple[list[Computed], int]:
    """Run a sequence to its end; return how its tokens were computed, and how many were cached."""
    chosen.add(spec(number, prompt, tokens))
    cached = 0
    while tokens:
        for output in chosen.step():
            if output.sequence_id == number and output.token_id is not None:
                cached, tokens = output.cached, tokens - 1
                computed = list(model.last)
    chosen.remove(number)
    return computed, cached


prompts = st.builds(
    lambda base, shared, rest: [*([base] * shared), *rest],
    st.integers(0, 1),
    st.integers(1, 120),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60),
)


@settings(max_examples=60, deadline=None)
@given(
    earlier=st.lists(st.tuples(prompts, st.integers(0, 5)), max_size=6),
    prompt=prompts,
    rows=st.integers(1, 4),
    can_cut=st.booleans(),
    limit=st.sampled_from([None, 7]),
)
def test_a_prompt_is_computed_as_in_a_new_engine(
    earlier: list[tuple[list[int], int]],
    prompt: list[int],
    rows: int,
    can_cut: bool,
    limit: int | None,
) -> None:
    fresh = RecordingModel(1)
    expected, _ = steps_of(stepper(fresh), fresh, 0, prompt, 4)
    model = RecordingModel(rows, can_cut=can_cut)
    chosen = stepper(model)
    # The machine is hot: fixed pieces stay as they are.
    chosen.limit_prefill(limit)
    for number, (before, steps) in enumerate(earlier):
        # Each is left after some steps, in its prompt or in its answer.
        chosen.add(spec(number, before, 9))
        for _ in range(steps):
            chosen.step()
        chosen.remove(number)
    assert steps_of(chosen, model, 99, prompt, 4)[0] == expected


def test_sequences_that_wait_together_are_computed_one_by_one() -> None:
    model = RecordingModel(4)
    chosen = stepper(model)
    assert chosen.max_sequences == 1
    for number in range(3):
        chosen.add(spec(number, [number] * 50, 5))
    while chosen.counters().steps < 9:
        for output in chosen.step():
            assert output.sequence_id == 0
        assert all(rows == 1 for *_, rows in model.last)


def test_whole_pieces_of_earlier_prompts_are_reused() -> None:
    model = RecordingModel(4)
    chosen = stepper(model)
    first = [1] * 100
    assert steps_of(chosen, model, 1, first, 4)[1] == 0
    # Neither the piece that was not full nor the answer is continued.
    assert steps_of(chosen, model, 2, [*first, 4, 4, 4], 4)[1] == 96
    assert steps_of(chosen, model, 3, [*first[:70], 2], 4)[1] == 64
    assert steps_of(chosen, model, 4, first, 4)[1] == 96
    assert steps_of(chosen, model, 5, first[:97], 1)[1] == 96
    assert steps_of(chosen, model, 6, first[:96], 1)[1] == 64


def test_an_answer_is_computed_again_as_a_part_of_the_next_prompt() -> None:
    model = RecordingModel(4)
    chosen = stepper(model)
    computed, _ = steps_of(chosen, model, 1, [1] * 60, 40)
    turn = [*(token for token, *_ in computed), 3, 3]
    fresh = RecordingModel(1)
    expected, _ = steps_of(stepper(fresh), fresh, 1, turn, 4)
    assert steps_of(chosen, model, 2, turn, 4) == (expected, 32)


def test_without_the_setting_every_token_is_reused() -> None:
    model = RecordingModel(4)
    chosen = stepper(model, is_fixed=False)
    assert chosen.max_sequences == 4
    steps_of(chosen, model, 1, [1] * 100, 4)
    assert steps_of(chosen, model, 2, [*([1] * 100), 5], 1)[1] == 100


@pytest.mark.parametrize(("tokens", "blocks"), [(512, 4), (384, 6), (100, 0), (128, 7), (1, 7)])
def test_stored_blocks_are_used_up_to_a_whole_piece(tokens: int, blocks: int) -> None:
    rule = PieceRule(is_fixed=True, tokens=tokens)
    stored = list(range(7))
    assert rule.blocks(stored) == stored[:blocks]
    assert blocks * BLOCK_TOKENS % tokens == 0
    assert rule.layout(None) is None
    assert rule.layout("f16") == f"f16, computed in pieces of {tokens}"
    assert PieceRule().blocks(stored) == stored
    assert PieceRule().layout("f16") == "f16"


def test_only_the_prompt_of_a_finished_sequence_is_kept_in_pieces() -> None:
    rule = PieceRule(is_fixed=True, tokens=32)
    prompt = array("i", range(70))
    assert rule.kept(90, len(prompt)) == 64
    assert rule.kept(40, len(prompt)) == 32
    assert PieceRule().kept(90, len(prompt)) == 90
