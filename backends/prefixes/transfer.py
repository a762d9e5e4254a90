"""Copies prefix blocks between an engine and the store, a few between two steps."""

import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Generic, Literal, TypeAlias, TypeVar

from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.index import Block
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.reuse import Nearest, Reuse, explain, nearest
from backends.prefixes.store import ModelBlocks, ModelPrefixStore, State
from core.types import MissReason

# While sequences run: the pause between two copies, and the time per step for restoring.
_PAUSE_S = 0.05
_STEP_S = 0.02
_READ_AHEAD = 3
_CLOSING_S = 2.0
# Recomputing shorter prompts is cheaper than storing them.
MIN_STORED_TOKENS = 2 * BLOCK_TOKENS

logger = logging.getLogger(__name__)

Owner = TypeVar("Owner", bound=Hashable)

# What became of a block that was handed to an engine: `refused` ones are dropped from the store.
Applied: TypeAlias = Literal["applied", "no_room", "refused"]


class Restore:
    """Reads a prompt's blocks in order on the store's thread, for use on the engine's thread."""

    def __init__(self, model_blocks: ModelBlocks, blocks: Sequence[Block]) -> None:
        self._model_blocks = model_blocks
        self._left = deque(blocks)
        self._reading: deque[tuple[Block, Future[tuple[State, bool] | MissReason]]] = deque()
        self._read_ahead()

    @property
    def is_over(self) -> bool:
        """Whether no more blocks will arrive."""
        return not self._reading

    def receive(self, reuse: Reuse, apply: Callable[[State], Applied]) -> None:
        """Pass arrived blocks to `apply`, for at most a part of a step's time.

        Ends the restore at a block that is lost or not applied.  Refused blocks are dropped with
        those after them, which have the same layout, so that they are computed and stored again.
        """
        end = time.monotonic() + _STEP_S
        while self._reading and self._reading[0][1].done():
            block, future = self._reading.popleft()
            found = _result(future)
            if isinstance(found, str):
                self.cancel()
                reuse.miss = found
                return
            outcome = _applied(apply, found[0])
            if outcome != "applied":
                rest = [block, *(each for each, _ in self._reading), *self._left]
                self.cancel()
                if outcome == "refused":
                    self._model_blocks.drop(rest)
                reuse.miss = "damaged" if outcome == "refused" else outcome
                return
            if found[1]:
                reuse.ram += BLOCK_TOKENS
            else:
                reuse.disk += BLOCK_TOKENS
            self._read_ahead()
            if time.monotonic() > end:
                return

    def _read_ahead(self) -> None:
        store = self._model_blocks.store
        while self._left and len(self._reading) < _READ_AHEAD:
            block = self._left.popleft()
            try:
                future = store.reader.submit(store.read, self._model_blocks, block)
            except RuntimeError as problem:
                logger.warning("prefix blocks are not restored: %s", problem)
                self._left.clear()
                return
            self._reading.append((block, future))

    def wait(self, timeout_s: float) -> None:
        """Block until the next block has arrived, or until the timeout."""
        if self._reading:
            wait([self._reading[0][1]], timeout_s)

    def cancel(self) -> None:
        """Stop reading."""
        for _, future in self._reading:
            future.cancel()
        self._reading.clear()
        self._left.clear()


def _result(future: Future[tuple[State, bool] | MissReason]) -> tuple[State, bool] | MissReason:
    """Return what was read; a failure of the reader costs the block, not the engine."""
    try:
        return future.result()
    except CancelledError:
        return "no_snapshot"
    except Exception:
        logger.warning("a prefix block cannot be read", exc_info=True)
        return "damaged"


def _applied(apply: Callable[[State], Applied], state: State) -> Applied:
    try:
        return apply(state)
    except MemoryError:
        return "no_room"
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as problem:
        logger.warning("a prefix block cannot be restored: %r", problem)
        return "no_room" if _lacks_memory(problem) else "refused"


def _lacks_memory(problem: Exception) -> bool:
    """Return whether it is a runtime's own error for memory: PyTorch and MLX raise RuntimeError."""
    text = str(problem).lower()
    return isinstance(problem, RuntimeError) and ("memory" in text or "alloc" in text)


class PrefixTransfer(Generic[Owner]):
    """Connects one engine to the store: looks up, restores and copies prefix blocks.

    `copy` returns the state of block `number` of the sequence that `owner` computed; it is called
    between two steps, on the engine's thread.  With `store` None nothing is found or stored.
    """

    def __init__(
        self,
        store: ModelPrefixStore | None,
        layout: str | None,
        copy: Callable[[Owner, int], State],
    ) -> None:
        """`layout` None means that the engine's cache cannot be split into blocks."""
        self._model_blocks = (
            store.open(layout) if store is not None and layout is not None else None
        )
        self._copy = copy
        self._queue: deque[tuple[Owner, array[int], int]] = deque()
        self._owners: dict[Owner, int] = {}
        self._copied_at = 0.0

    def find(self, prompt: "array[int]") -> list[Block]:
        """Return the stored blocks at the start of `prompt`."""
        return self._model_blocks.chain(prompt) if self._model_blocks is not None else []

    def restore(self, prompt: "array[int]", blocks: Sequence[Block]) -> Restore:
        """Start reading these blocks of `prompt`."""
        assert self._model_blocks is not None
        self._model_blocks.touch(prompt)
        return Restore(self._model_blocks, blocks)

    def queue(self, owner: Owner, tokens: "array[int]") -> None:
        """Queue the blocks that `owner` computed and that are not stored yet for copying."""
        if self._model_blocks is None or len(tokens) < MIN_STORED_TOKENS:
            return
        missing = self._model_blocks.missing(tokens)
        if not missing:
            self._model_blocks.touch(tokens)
            return
        self._queue.extend((owner, tokens, number) for number in missing)
        self._owners[owner] = self._owners.get(owner, 0) + len(missing)

    def is_queued(self, owner: Owner) -> bool:
        """Whether blocks of `owner` are still to be copied."""
        return owner in self._owners

    def discard(self, owner: Owner) -> None:
        """Cancel copying blocks of `owner`, whose state is gone."""
        if self._owners.pop(owner, 0):
            self._queue = deque(item for item in self._queue if item[0] != owner)

    @property
    def has_chores(self) -> bool:
        """Whether blocks are to be copied."""
        return bool(self._queue)

    def do_chore(self) -> None:
        """Copy one block; waits briefly if the disk does not keep up."""
        if self._model_blocks is None or not self._queue:
            return
        if not self._model_blocks.store.has_room():
            self._model_blocks.store.wait_for_room(_PAUSE_S)
            return
        owner, tokens, number = self._queue.popleft()
        self._owners[owner] -= 1
        if not self._owners[owner]:
            del self._owners[owner]
        try:
            state = self._copy(owner, number)
        except (ArithmeticError, MemoryError, RuntimeError, ValueError) as problem:
            # A failed copy must not fail the requests that are running.
            logger.warning("a prefix block cannot be copied out of the engine: %r", problem)
            self.discard(owner)
            return
        self._model_blocks.put(tokens, number, state)
        if owner not in self._owners:
            self._model_blocks.touch(tokens)

    def copy_if_due(self) -> None:
        """Copy one block after a step, if the last copy was some time ago."""
        if not self._queue or time.monotonic() - self._copied_at < _PAUSE_S:
            return
        if self._model_blocks is not None and self._model_blocks.store.has_room():
            self.do_chore()
        self._copied_at = time.monotonic()

    def finish(self) -> None:
        """Copy and write the remaining blocks before the engine closes, for at most 2 s."""
        end = time.monotonic() + _CLOSING_S
        while self._queue and time.monotonic() < end:
            self.do_chore()
        self._queue.clear()
        self._owners.clear()
        if self._model_blocks is not None:
            self._model_blocks.store.flush(max(end - time.monotonic(), _STEP_S))

    def explain_reuse(
        self, planned: int, prompt: "array[int]", known: Sequence["array[int]"]
    ) -> Reuse:
        """Return why only `planned` tokens of `prompt` are reused; `known` is in the engine."""
        found, reuse = nearest(prompt, known), Reuse()
        if self._model_blocks is None:
            explain(reuse, planned, prompt, found, "no_snapshot")
            return reuse
        count = len(self._model_blocks.chain(prompt))
        shared, rest = self._model_blocks.nearest(prompt, count)
        if shared > found.shared:
            found = Nearest(shared, rest)
        number = max(count, planned // BLOCK_TOKENS)
        explain(reuse, planned, prompt, found, self._model_blocks.why_absent(prompt, number))
        return reuse


def is_worth_restoring(blocks: Sequence[Block], others: int) -> bool:
    """Whether restoring these blocks saves more than reusing `others` tokens."""
    return len(blocks) * BLOCK_TOKENS >= others + SMALLEST_PREFIX


def wait_for_first_block(incoming: Sequence[Restore | None]) -> None:
    """Wait briefly for the next block of the first restore, when no sequence can run."""
    for each in incoming:
        if each is not None:
            each.wait(_STEP_S)
            return
