"""Tests of the prefix block store and transfer: lookup, sources, limits, miss reasons."""

import errno
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.reuse import Reuse, explain, nearest
from backends.prefixes.store import BlockStore, ModelBlocks, State
from backends.prefixes.transfer import Applied, PrefixTransfer, Restore
from core.types import MissReason
from tests.prefixes import folder_at, place_in, prompt_of, state_of, store_at


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    """Disk alone."""
    store = store_at(tmp_path)
    yield store
    store.close()


def put(model: ModelBlocks, tokens: "array[int]") -> None:
    """Put all blocks of a prompt and wait until they are stored."""
    for number in model.missing(tokens):
        model.put(tokens, number, state_of(number))
    assert model.store.flush(10)
    model.touch(tokens)


def found(model: ModelBlocks, tokens: "array[int]", layout: str = "layout") -> int:
    """Return how many tokens of the prompt can be restored, having read all of them."""
    transfer = PrefixTransfer[int](place_in(model.store), layout, lambda *_: state_of(0))
    states: list[State] = []

    def take(state: State) -> Applied:
        states.append(state)
        return "applied"

    restore = transfer.restore(tokens, model.chain(tokens))
    while not restore.is_over:
        restore.wait(5)
        restore.receive(Reuse(), take)
    for number, state in enumerate(states):
        np.testing.assert_array_equal(state, state_of(number))
    return len(states) * BLOCK_TOKENS


def test_a_longer_conversation_finds_the_shorter(store: BlockStore) -> None:
    model = place_in(store).open("layout")
    put(model, prompt_of(3))
    assert found(model, prompt_of(5)) == 3 * BLOCK_TOKENS
    assert model.missing(prompt_of(5)) == [3, 4]


def test_prompts_that_begin_alike_share_blocks(store: BlockStore) -> None:
    model = place_in(store).open("layout")
    one = prompt_of(4)
    put(model, one)
    other = one[: 2 * BLOCK_TOKENS] + prompt_of(2, 7)
    assert model.missing(other) == [2, 3]
    assert found(model, other) == 2 * BLOCK_TOKENS


def test_another_process_finds_what_was_written(tmp_path: Path) -> None:
    first = store_at(tmp_path)
    put(place_in(first).open("layout"), prompt_of(2))
    first.close()
    second = store_at(tmp_path)
    assert found(place_in(second).open("layout"), prompt_of(2)) == 2 * BLOCK_TOKENS
    second.close()


@pytest.mark.parametrize("change", ["files", "layout"])
def test_another_version_finds_nothing_and_says_so(tmp_path: Path, change: str) -> None:
    first = store_at(tmp_path)
    put(place_in(first).open("layout"), prompt_of(2))
    first.close()
    second = store_at(tmp_path)
    marks = "second version" if change == "files" else "first version"
    model = place_in(second, marks).open("other" if change == "layout" else "layout")
    assert model.chain(prompt_of(2)) == []
    assert model.why_absent(prompt_of(2), 0) == "other_model_version"
    second.close()


def test_layouts_of_one_version_are_kept_apart(tmp_path: Path) -> None:
    """A model is opened with other KV types as memory allows, and then as before."""
    store = store_at(tmp_path, ram_bytes=10_000)
    put(place_in(store).open("f16"), prompt_of(2))
    quantized = place_in(store).open("q8_0")
    assert found(quantized, prompt_of(2), "q8_0") == 0
    assert quantized.why_absent(prompt_of(2), 0) == "other_model_version"
    assert quantized.why_absent(prompt_of(2, 9), 0) == "no_snapshot"
    put(quantized, prompt_of(2))
    store.close()
    again = store_at(tmp_path)
    for layout in ("f16", "q8_0"):
        assert found(place_in(again).open(layout), prompt_of(2), layout) == 2 * BLOCK_TOKENS
    # Another version of the file ends them all.
    place_in(again, "second version").open("f16").chain(prompt_of(2))
    again.close()
    assert list(tmp_path.glob("*/*.block")) == []


@pytest.mark.parametrize(
    ("outcome", "reason", "left"),
    [("refused", "damaged", 1), ("no_room", "no_room", 4), ("applied", None, 4)],
)
def test_blocks_that_are_refused_are_dropped_with_those_after_them(
    store: BlockStore, outcome: Applied, reason: str | None, left: int
) -> None:
    model, tokens = place_in(store).open("layout"), prompt_of(4)
    put(model, tokens)
    outcomes: Iterator[Applied] = iter(["applied", outcome, outcome, outcome])
    reuse = Reuse()
    restore = Restore(model, model.chain(tokens))
    while not restore.is_over:
        restore.wait(5)
        restore.receive(reuse, lambda _: next(outcomes))
    assert reuse.miss == reason
    assert len(model.chain(tokens)) == left
    if reason is not None:
        assert reuse.disk == BLOCK_TOKENS
    if outcome == "refused":
        assert model.why_absent(tokens, 1) == "damaged"
        put(model, tokens)
        assert len(model.chain(tokens)) == 4
        assert found(model, tokens) == 4 * BLOCK_TOKENS


def test_a_refused_block_is_also_dropped_from_ram_and_from_what_waits(tmp_path: Path) -> None:
    store = store_at(tmp_path, ram_bytes=10_000)
    model, tokens = place_in(store).open("layout"), prompt_of(3)
    put(model, tokens)
    model.drop(model.chain(tokens))
    assert store.ram_bytes == 0
    for number in range(3):
        model.put(tokens, number, state_of(number))
    model.drop(model.chain(tokens))
    assert store.flush(10)
    store.close()
    assert store.ram_bytes == 0
    assert model.chain(tokens) == []
    assert list(tmp_path.glob("*/*.block")) == []


@pytest.mark.parametrize(
    ("problem", "reason", "is_kept"),
    [
        (FileNotFoundError(errno.ENOENT, "gone"), "evicted", False),
        (OSError(errno.EIO, "broken"), "damaged", False),
        (OSError(errno.EMFILE, "too many"), "no_room", True),
        (MemoryError(), "no_room", True),
        (AssertionError("of the reader"), "damaged", True),
    ],
)
def test_the_reason_of_a_block_that_cannot_be_read(
    store: BlockStore,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    reason: str,
    is_kept: bool,
) -> None:
    def fail(*_: object) -> State:
        raise problem

    model, tokens = place_in(store).open("layout"), prompt_of(2)
    put(model, tokens)
    monkeypatch.setattr("backends.prefixes.disk.read_state", fail)
    reuse = Reuse()
    restore = Restore(model, model.chain(tokens))
    while not restore.is_over:
        restore.wait(5)
        restore.receive(reuse, lambda _: "applied")
    assert reuse.miss == reason
    assert (len(model.chain(tokens)) == 2) == is_kept


def test_a_store_that_is_closed_serves_no_blocks_and_raises_nothing(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    model, tokens = place_in(store).open("layout"), prompt_of(2)
    put(model, tokens)
    store.close()
    assert found(model, tokens) == 0
    model.put(prompt_of(2, 5), 0, state_of(0))
    assert store.flush(0)
    assert model.chain(prompt_of(2, 5)) == []


def test_tokens_are_compared_and_not_only_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that say nothing must not let one prompt take another's state."""
    for module in ("store", "index"):
        monkeypatch.setattr(
            f"backends.prefixes.{module}.block_keys",
            lambda tokens: [bytes([n]) * 16 for n in range(len(tokens) // BLOCK_TOKENS)],
        )
    store = store_at(tmp_path, ram_bytes=10_000, size_bytes=0)
    model = place_in(store).open("layout")
    model.put(prompt_of(1, 1), 0, state_of(0))
    assert len(model.chain(prompt_of(1, 1))) == 1
    assert model.chain(prompt_of(1, 2)) == []
    store.close()


def test_ram_holds_what_it_may_and_no_more(tmp_path: Path) -> None:
    store = store_at(tmp_path, ram_bytes=3500, size_bytes=0)
    model = place_in(store).open("layout")
    put(model, prompt_of(2, 1))
    put(model, prompt_of(2, 2))
    assert store.ram_bytes == 3000
    # The older prompt lost its last block first.
    assert found(model, prompt_of(2, 1)) == BLOCK_TOKENS
    assert found(model, prompt_of(2, 2)) == 2 * BLOCK_TOKENS
    assert model.why_absent(prompt_of(2, 1), 1) == "evicted"
    assert list(tmp_path.glob("*/*.block")) == []
    store.close()


def test_ram_survives_another_opening_but_not_another_version(tmp_path: Path) -> None:
    store = store_at(tmp_path, ram_bytes=10_000, size_bytes=0)
    put(place_in(store).open("layout"), prompt_of(2))
    assert found(place_in(store).open("layout"), prompt_of(2)) == 2 * BLOCK_TOKENS
    place_in(store, "second version").open("layout")
    assert store.ram_bytes == 0
    store.close()


def test_what_the_disk_dropped_is_evicted(tmp_path: Path) -> None:
    store = store_at(tmp_path, size_bytes=5000)
    model = place_in(store).open("layout")
    put(model, prompt_of(2, 1))
    put(model, prompt_of(2, 2))
    assert found(model, prompt_of(2, 2)) == 2 * BLOCK_TOKENS
    assert len(model.chain(prompt_of(2, 1))) < 2
    store.close()


def test_a_damaged_block_ends_the_restore(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    model = place_in(store).open("layout")
    put(model, prompt_of(3))
    path = model.chain(prompt_of(3))[1].path
    assert path is not None
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert found(model, prompt_of(3)) == BLOCK_TOKENS
    assert not path.exists()
    assert len(model.chain(prompt_of(3))) == 1
    store.close()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = BlockStore(folder_at(tmp_path / "file" / "prefixes"), 10_000)
    model = place_in(store).open("layout")
    model.put(prompt_of(1), 0, state_of(0))
    assert store.flush(10)
    assert model.chain(prompt_of(1)) == []
    store.close()


def test_many_threads_put_and_read_at_once(tmp_path: Path) -> None:
    store = store_at(tmp_path, ram_bytes=20_000, size_bytes=40_000)
    model = place_in(store).open("layout")
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                tokens = prompt_of(4, seed)
                for number in model.missing(tokens):
                    model.put(tokens, number, state_of(number))
                found(model, tokens)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert store.flush(10)
    assert store.ram_bytes <= 20_000
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.block")) <= 40_000
    store.close()


class Owner:
    """Something computed whose blocks are copied out."""


def test_chores_copy_what_is_missing_once(store: BlockStore) -> None:
    copied: list[int] = []

    def copy(_: Owner, number: int) -> State:
        copied.append(number)
        return state_of(number)

    transfer = PrefixTransfer[Owner](place_in(store), "layout", copy)
    owner, tokens = Owner(), prompt_of(3, more=17)
    transfer.queue(owner, tokens)
    assert transfer.is_queued(owner)
    transfer.do_chore()
    transfer.discard(owner)
    assert not transfer.has_chores
    transfer.queue(Owner(), tokens)
    transfer.finish()
    assert copied == [0, 1, 2]
    assert len(transfer.find(tokens)) == 3
    transfer.queue(Owner(), tokens)
    assert not transfer.has_chores


def test_short_prompts_are_not_kept(store: BlockStore) -> None:
    transfer = PrefixTransfer[Owner](place_in(store), "layout", lambda *_: state_of(0))
    transfer.queue(Owner(), prompt_of(1, more=100))
    assert not transfer.has_chores


def test_what_a_runtime_cannot_copy_is_forgotten(store: BlockStore) -> None:
    def copy(_: Owner, number: int) -> State:
        if number == 1:
            raise RuntimeError("no such cells")
        return state_of(number)

    transfer = PrefixTransfer[Owner](place_in(store), "layout", copy)
    transfer.queue(Owner(), prompt_of(4))
    transfer.finish()
    assert len(transfer.find(prompt_of(4))) == 1


def test_without_a_place_nothing_is_kept_or_found() -> None:
    transfer = PrefixTransfer[Owner](None, "layout", lambda *_: state_of(0))
    transfer.queue(Owner(), prompt_of(2))
    assert not transfer.has_chores
    assert transfer.find(prompt_of(2)) == []
    reuse = transfer.explain_reuse(0, prompt_of(2), [])
    assert reuse.miss == "no_snapshot"


def test_a_miss_names_the_first_token_that_differs(store: BlockStore) -> None:
    model = place_in(store).open("layout")
    known = prompt_of(3)
    put(model, known)
    asked = known[:]
    asked[300] = known[300] + 1
    transfer = PrefixTransfer[Owner](place_in(store), "layout", lambda *_: state_of(0))
    reuse = transfer.explain_reuse(2 * BLOCK_TOKENS, asked, [])
    assert (reuse.miss, reuse.diverged_at) == ("diverged", 300)
    assert reuse.known[0] == known[300]
    outcome = reuse.outcome(asked.tolist(), 0, lambda token: bytes((token,)))
    assert outcome.known_text.encode()[0] == known[300]
    assert outcome.asked_text.encode()[0] == asked[300]
    assert outcome.before_text.encode() == bytes(known[292:300].tolist())


@pytest.mark.parametrize(
    ("planned", "shared", "absent", "reason"),
    [
        (0, 300, "no_snapshot", "no_snapshot"),
        (256, 300, "no_snapshot", "diverged"),
        (300, 300, "no_snapshot", "diverged"),
        (256, 300, "evicted", "evicted"),
        (256, 300, "damaged", "damaged"),
        (0, 0, "other_model_version", "other_model_version"),
        (400, 300, "evicted", None),
    ],
)
def test_the_reason_is_that_of_the_first_token_that_was_computed(
    planned: int, shared: int, absent: MissReason, reason: MissReason | None
) -> None:
    """Tokens that are known but have no usable state did not diverge."""
    prompt = prompt_of(3, more=17)
    known = prompt_of(3, more=17)
    if shared < len(known):
        known[shared] += 1
    reuse = Reuse()
    explain(reuse, planned, prompt, nearest(prompt, [known]), absent)
    assert reuse.miss == reason
    assert (reuse.diverged_at == shared) == (reason == "diverged")


def test_what_was_evicted_elsewhere_is_not_the_reason(tmp_path: Path) -> None:
    """The engine's own cells reach beyond the evicted block, up to where the prompts differ."""
    store = store_at(tmp_path)
    model, known = place_in(store).open("layout"), prompt_of(4)
    put(model, known)
    with store.lock:
        model.index.drop(model.index.chain(known)[1], "evicted")
    asked = known[:]
    asked[300] += 1
    transfer = PrefixTransfer[Owner](place_in(store), "layout", lambda *_: state_of(0))
    reuse = transfer.explain_reuse(300, asked, [known])
    assert (reuse.miss, reuse.diverged_at) == ("diverged", 300)
    assert transfer.explain_reuse(128, known, []).miss == "evicted"
    store.close()


def test_a_prompt_that_goes_on_misses_nothing(store: BlockStore) -> None:
    transfer = PrefixTransfer[Owner](place_in(store), "layout", lambda *_: state_of(0))
    asked = prompt_of(2, more=5)
    assert transfer.explain_reuse(300, asked, [asked[:300], prompt_of(1, 4)]).miss is None
    assert transfer.explain_reuse(len(asked) - 1, asked, [asked]).miss is None
