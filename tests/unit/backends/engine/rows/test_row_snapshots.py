"""A row stepper whose rows outlive it, and fairness between long and short prompts."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import EngineOptions
from backends.engine.row_stepper import RowStepper
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.store import BlockStore
from backends.stepper import StepOutput
from tests.prefixes import place_in, store_at
from tests.unit.backends.engine.rows.test_row_stepper import (
    FakeModel,
    Pieces,
    Run,
    expected,
    prompt_of,
    spec,
)

LONG = 3 * BLOCK_TOKENS + 40


class PortableModel(FakeModel):
    """Rows whose bytes are their history."""

    layout = "portable"
    broken = False

    def read_tokens(self, row: int, start: int, count: int) -> NDArray[np.uint8]:
        return np.array(self.rows[row][start : start + count], np.int32).view(np.uint8)

    def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
        if self.broken:
            return False
        tokens = state.view(np.int32).tolist()
        assert len(tokens) == count
        self.rows[row].extend(tokens)
        return True


def stepper(model: FakeModel, store: BlockStore | None, *, kv_tokens: int = 8192) -> RowStepper:
    options = EngineOptions(
        max_sequences=4,
        prefill_chunk_tokens=64,
        kv_tokens=kv_tokens,
        context_tokens=4096,
        prefix_store=None if store is None else place_in(store),
    )
    return RowStepper(model, Pieces(), options)


def answer(model: FakeModel, store: BlockStore, prompt: Sequence[int]) -> tuple[list[int], int]:
    """Answer one prompt with an engine that is closed then; return its tokens, and the cached."""
    chosen = stepper(model, store)
    run = Run(chosen)
    run.add(1, prompt)
    run.finish()
    chosen.close()
    return run.tokens[1], run.cached[1]


def test_a_prompt_is_not_computed_again_after_its_engine_closed(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    first, second = PortableModel(4), PortableModel(4)
    prompt = prompt_of(LONG)
    assert answer(first, store, prompt) == (expected(prompt, 8), 0)
    assert answer(second, store, prompt) == (expected(prompt, 8), 3 * BLOCK_TOKENS)
    assert first.computed - second.computed == 3 * BLOCK_TOKENS
    store.close()


def written_bytes(folder: Path) -> int:
    """Return how many bytes of blocks were written today."""
    return int(json.loads((folder / "state.json").read_text())["written_bytes"])


def test_blocks_that_are_refused_are_computed_and_stored_again(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    prompt = prompt_of(LONG)
    answer(PortableModel(4), store, prompt)
    broken = PortableModel(4)
    broken.broken = True
    before = written_bytes(tmp_path)
    assert answer(broken, store, prompt) == (expected(prompt, 8), 0)
    assert written_bytes(tmp_path) == 2 * before
    assert answer(PortableModel(4), store, prompt) == (expected(prompt, 8), 3 * BLOCK_TOKENS)
    store.close()


def test_a_block_that_breaks_the_runtime_ends_the_restore_only(tmp_path: Path) -> None:
    class Raising(PortableModel):
        def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
            raise ValueError(f"{state.nbytes} bytes are not {count} tokens of row {row}")

    store = store_at(tmp_path)
    prompt = prompt_of(LONG)
    answer(PortableModel(4), store, prompt)
    assert answer(Raising(4), store, prompt) == (expected(prompt, 8), 0)
    store.close()


@pytest.mark.parametrize("kv_tokens", [LONG + 200, 8192])
def test_rows_that_restore_run_beside_others(tmp_path: Path, kv_tokens: int) -> None:
    store = store_at(tmp_path)
    prompts = [prompt_of(LONG, 1), prompt_of(LONG, 2), prompt_of(60, 3)]
    for prompt in prompts:
        answer(PortableModel(4), store, prompt)
    model = PortableModel(6)
    chosen = stepper(model, store, kv_tokens=kv_tokens)
    run = Run(chosen)
    for number, prompt in enumerate(prompts):
        run.add(number, [*prompt, 7])
    run.finish()
    assert [run.tokens[n] for n in range(3)] == [expected([*prompt, 7], 8) for prompt in prompts]
    assert run.cached[0] == 3 * BLOCK_TOKENS
    assert model.most_held <= kv_tokens
    chosen.close()
    store.close()


def test_a_cancelled_restore_leaves_nothing(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    answer(PortableModel(4), store, prompt_of(LONG))
    model = PortableModel(4)
    chosen = stepper(model, store)
    chosen.add(spec(1, prompt_of(LONG)))
    chosen.step()
    chosen.remove(1)
    assert chosen.step() == []
    chosen.close()
    store.close()


def test_chores_wait_until_the_engine_is_idle_or_has_a_pause(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    chosen = stepper(PortableModel(4), store)
    run = Run(chosen)
    run.add(1, prompt_of(LONG))
    run.finish()
    assert chosen.has_chores
    while chosen.has_chores:
        chosen.do_chore()
    assert store.flush(10)
    assert len(list(tmp_path.glob("*/*.block"))) == 3
    chosen.close()
    store.close()


def test_the_source_and_the_miss_are_told(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    answer(PortableModel(4), store, prompt_of(LONG))
    other = [*prompt_of(LONG)]
    other[2 * BLOCK_TOKENS + 5] += 1
    run = Run(stepper(PortableModel(4), store))
    run.add(1, other)
    outputs: list[StepOutput] = []
    while run.limits:
        outputs += run.step()
    reuse = outputs[-1].reuse
    assert reuse is not None
    assert (reuse.cells, reuse.ram, reuse.disk) == (0, 0, 2 * BLOCK_TOKENS)
    assert (reuse.miss, reuse.diverged_at) == ("diverged", 2 * BLOCK_TOKENS + 5)
    run.stepper.close()
    store.close()


def first_tokens(run: Run, most_steps: int) -> dict[int, int]:
    """Return the step in which each sequence got its first token."""
    found: dict[int, int] = {}
    for number in range(most_steps):
        for output in run.step():
            if output.token_id is not None:
                found.setdefault(output.sequence_id, number)
    return found


def test_a_short_prompt_passes_a_long_one_which_is_not_starved() -> None:
    run = Run(stepper(FakeModel(8), None))
    run.add(0, prompt_of(1024), max_tokens=1)
    for number in range(1, 30):
        run.add(number, prompt_of(40, number), max_tokens=1)
    steps = first_tokens(run, 200)
    assert steps[1] < 3
    # A quarter of each step is the long one's, whatever comes meanwhile.
    assert steps[0] <= 1024 // 16 + 1


def test_decoding_goes_on_in_every_step_of_a_long_prompt() -> None:
    run = Run(stepper(FakeModel(8), None))
    run.add(1, prompt_of(10), max_tokens=60)
    run.step()
    run.add(2, prompt_of(1000, 2), max_tokens=1)
    while 2 in run.limits and 1 in run.limits:
        outputs = run.step()
        assert [o.token_id is not None for o in outputs if o.sequence_id == 1] == [True]


def test_a_long_prompt_tells_its_progress_in_every_step() -> None:
    run = Run(stepper(FakeModel(8), None))
    run.add(1, prompt_of(640), max_tokens=1)
    progress = [output.prefilled for _ in range(10) for output in run.step()]
    assert progress == [64 * n for n in range(1, 11)]
