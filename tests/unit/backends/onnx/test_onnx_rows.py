"""Rows of tiny decoders: whatever runs beside a row, its logits are those it has alone."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.engine.row_model import PortableRows, RowInput, RowModel
from backends.onnx.graph import read_graph
from backends.onnx.layout import DecoderLayout, read_layout
from backends.onnx.padded_rows import PaddedRows
from backends.onnx.ragged_rows import RaggedRows
from backends.onnx.session import DecoderSession, open_session
from core.errors import EngineFailed
from tests.onnx_files import POSITIONS, VOCABULARY, decoder, write

MAX_ROWS = 6
KINDS: dict[str, dict[str, Any]] = {
    "grouped": {"attention": "grouped", "extras": ()},
    "grouped-f16": {"attention": "grouped", "extras": (), "dtype": "float16"},
    "padded": {},
    "padded-f16": {"dtype": "float16"},
    "merged": {"extras": ("position_ids", "use_cache_branch")},
    "last-logits": {"extras": ("position_ids", "num_logits_to_keep")},
    "cache-position": {"extras": ("position_ids", "cache_position")},
    "no-positions": {"extras": ()},
}


def open_model(folder: Path, **options: Any) -> RowModel:
    graph = read_graph(write(folder, decoder(**options)))
    layout = read_layout(graph, {})
    assert isinstance(layout, DecoderLayout)
    session = DecoderSession(open_session(graph.path, 1), layout)
    if layout.is_ragged:
        return RaggedRows(session, max_rows=MAX_ROWS, kv_tokens=256)
    return PaddedRows(session, max_rows=MAX_ROWS)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str, tmp_path: Path) -> RowModel:
    return open_model(tmp_path, **KINDS[kind])


@pytest.fixture
def tolerance(kind: str) -> float:
    return 0.1 if kind.endswith("f16") else 1e-4


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


def alone(model: RowModel, ids: Sequence[int]) -> NDArray[np.float32]:
    """Return the logits after `ids`, computed at once in a row of their own."""
    row = model.open_row(len(ids))
    logits = model.extend([RowInput(row, ids)])
    model.close_row(row)
    return logits.reshape(VOCABULARY)


def test_layout_is_recognised(kind: str, model: RowModel) -> None:
    assert isinstance(model, RaggedRows) == kind.startswith("grouped")
    assert model.vocabulary_size == VOCABULARY


def test_chunks_give_what_one_pass_gives(model: RowModel, tolerance: float) -> None:
    ids = tokens(1, 40)
    row = model.open_row(40)
    for start, end in ((0, 1), (1, 17), (17, 18), (18, 39), (39, 40)):
        logits = model.extend([RowInput(row, ids[start:end])])
        assert logits.shape == (1, VOCABULARY)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits[0], alone(model, ids[:end]), atol=tolerance)


def test_rows_of_different_lengths_do_not_touch_each_other(
    model: RowModel, tolerance: float
) -> None:
    texts = [tokens(seed, length) for seed, length in ((1, 30), (2, 4), (3, 17))]
    expected = [alone(model, text) for text in texts]
    rows = [model.open_row(30) for _ in texts]
    for row, text in zip(rows, texts, strict=True):
        model.extend([RowInput(row, text[:-2])])
    order = [2, 0, 1]
    model.extend([RowInput(rows[i], texts[i][-2:-1]) for i in order])
    logits = model.extend([RowInput(rows[i], texts[i][-1:]) for i in order])
    for place, index in enumerate(order):
        np.testing.assert_allclose(logits[place], expected[index], atol=tolerance)


def test_a_step_may_mix_decoding_and_prefill(model: RowModel, tolerance: float) -> None:
    first, second = tokens(1, 12), tokens(2, 25)
    expected = [alone(model, first), alone(model, second)]
    one, other = model.open_row(12), model.open_row(25)
    model.extend([RowInput(one, first[:-1]), RowInput(other, second[:9])])
    logits = model.extend([RowInput(other, second[9:]), RowInput(one, first[-1:])])
    np.testing.assert_allclose(logits[0], expected[1], atol=tolerance)
    np.testing.assert_allclose(logits[1], expected[0], atol=tolerance)


def test_a_truncated_row_goes_on_from_there(model: RowModel, tolerance: float) -> None:
    ids = tokens(4, 20)
    row, other = model.open_row(30), model.open_row(30)
    model.extend([RowInput(row, ids), RowInput(other, ids)])
    model.extend([RowInput(row, [5]), RowInput(other, [6])])
    assert model.truncate(row, 8)
    logits = model.extend([RowInput(other, [7]), RowInput(row, [9])])
    np.testing.assert_allclose(logits[0], alone(model, [*ids, 6, 7]), atol=tolerance)
    np.testing.assert_allclose(logits[1], alone(model, [*ids[:8], 9]), atol=tolerance)


def test_a_copied_row_is_independent(model: RowModel, tolerance: float) -> None:
    ids = tokens(5, 20)
    source = model.open_row(30)
    model.extend([RowInput(source, ids)])
    copied = model.copy_row(source, 11, 30)
    assert copied is not None
    logits = model.extend([RowInput(source, [1]), RowInput(copied, [2])])
    np.testing.assert_allclose(logits[0], alone(model, [*ids, 1]), atol=tolerance)
    np.testing.assert_allclose(logits[1], alone(model, [*ids[:11], 2]), atol=tolerance)


def test_no_row_is_copied_where_none_is_free(model: RowModel) -> None:
    rows = [model.open_row(4) for _ in range(MAX_ROWS)]
    model.extend([RowInput(rows[0], [1, 2, 3])])
    assert model.copy_row(rows[0], 2, 4) is None


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_same_logits(model: RowModel, tolerance: float, seed: int) -> None:
    chance = random.Random(seed)
    held: dict[int, list[int]] = {}
    for _ in range(60):
        action = chance.random()
        if len(held) < MAX_ROWS - 1 and action < 0.3:
            held[model.open_row(POSITIONS)] = []
        elif len(held) < MAX_ROWS - 1 and held and action < 0.4:
            source = chance.choice(list(held))
            length = chance.randint(0, len(held[source]))
            copied = model.copy_row(source, length, POSITIONS)
            assert copied is not None
            held[copied] = held[source][:length]
        elif held and action < 0.5:
            row = chance.choice(list(held))
            model.close_row(row)
            del held[row]
        elif held and action < 0.6:
            row = chance.choice(list(held))
            length = chance.randint(0, len(held[row]))
            assert model.truncate(row, length)
            held[row] = held[row][:length]
        chosen = chance.sample(list(held), chance.randint(0, len(held)))
        chosen = [row for row in chosen if len(held[row]) < POSITIONS - 10]
        added = {row: chance.choices(range(64), k=chance.choice((1, 1, 1, 6))) for row in chosen}
        if not added:
            continue
        logits = model.extend([RowInput(row, new) for row, new in added.items()])
        for result, (row, new) in zip(logits, added.items(), strict=True):
            held[row] = held[row] + new
            np.testing.assert_allclose(result, alone(model, held[row]), atol=tolerance)


def test_memory_of_closed_rows_is_given_back(tmp_path: Path) -> None:
    model = open_model(tmp_path, attention="grouped", extras=())
    assert isinstance(model, RaggedRows)
    keeper = model.open_row(8)
    model.extend([RowInput(keeper, tokens(1, 8))])
    for _ in range(3):
        others = [model.open_row(100) for _ in range(MAX_ROWS - 1)]
        for row in others:
            model.extend([RowInput(row, tokens(2, 100))])
        assert model.touched_tokens == 8 + 100 * len(others)
        for row in others:
            model.close_row(row)
    again = model.open_row(8)
    assert model.touched_tokens == 8
    model.close_row(again)
    model.close_row(keeper)
    assert model.touched_tokens == 0


def test_a_failing_step_is_an_engine_failure(model: RowModel) -> None:
    row = model.open_row(8)
    with pytest.raises(EngineFailed, match="onnxruntime"):
        model.extend([RowInput(row, [1, VOCABULARY])])
    assert model.extend([RowInput(row, [1, 2])]).shape == (1, VOCABULARY)


def test_cpu_time_is_counted(model: RowModel) -> None:
    row = model.open_row(100)
    before = model.native_cpu_s
    model.extend([RowInput(row, tokens(1, 100))])
    assert model.native_cpu_s > before


def test_close_twice(model: RowModel) -> None:
    model.open_row(4)
    model.close()
    model.close()


def test_a_row_goes_on_in_another_process_from_its_bytes(
    model: RowModel, kind: str, tolerance: float, tmp_path: Path
) -> None:
    assert isinstance(model, PortableRows)
    ids = tokens(5, 40)
    row = model.open_row(60)
    model.extend([RowInput(row, ids[:32])])
    states = [model.read_tokens(row, start, 16) for start in (0, 16)]
    wanted = model.extend([RowInput(row, ids[32:])])

    (tmp_path / "other").mkdir()
    other = open_model(tmp_path / "other", **KINDS[kind])
    assert isinstance(other, PortableRows)
    assert other.layout == model.layout
    busy = other.open_row(60)
    other.extend([RowInput(busy, ids[:7])])
    row = other.open_row(60)
    assert all(other.append_tokens(row, 16, state) for state in states)
    found = other.extend([RowInput(row, ids[32:])])
    np.testing.assert_allclose(found, wanted, atol=tolerance)
    assert not other.append_tokens(row, 16, states[0][:-2])
    other.close()
