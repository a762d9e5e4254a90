"""Computed prefixes that outlive their engine: blocks of tokens in RAM and on disk.

A prefix is a chain of blocks of `BLOCK_TOKENS` tokens.  Conversations that begin alike share
their first blocks, a longer one finds the shorter, and each turn adds only its own blocks.
"""

import logging
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.prefixes.block_file import BLOCK_TOKENS, ROOT, block_keys, head_of
from backends.prefixes.disk import PrefixFolder
from backends.prefixes.index import Block, BlockIndex
from core.types import MissReason
from core.units import MIB

logger = logging.getLogger(__name__)

State: TypeAlias = NDArray[np.uint8]

# How long a lookup waits for the list of a model's files, which is read while it is opened.
_SCAN_LIMIT_S = 2.0
# Bytes that wait to be written; more are not copied out of an engine meanwhile.
_MOST_WAITING_BYTES = 64 * MIB
_BATCH = 8


class Snapshots:
    """The blocks of all models of one process: `ram_bytes` of them in RAM, others in `folder`.

    The RAM is shared with other processes of the same folder.  Files are written and listed on
    one thread and read on another; no caller waits for them.
    """

    def __init__(self, folder: PrefixFolder, ram_bytes: int) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self._limit_bytes = ram_bytes
        self._held: OrderedDict[Block, ModelSnapshots] = OrderedDict()
        self._held_bytes = 0
        self._waiting: deque[tuple[ModelSnapshots, Block]] = deque()
        self._waiting_bytes = 0
        self._room = threading.Condition(self.lock)
        self._models: dict[str, ModelSnapshots] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="impetus-prefix-w")
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="impetus-prefix-r")

    @property
    def held_bytes(self) -> int:
        """Bytes of blocks in RAM, those that wait to be written not counted."""
        return self._held_bytes

    def of(self, model: str, fingerprint: bytes) -> "ModelSnapshots":
        """Return the model's blocks; those of another version of it are dropped."""
        with self.lock:
            known = self._models.get(model)
            if known is not None and known.fingerprint == fingerprint:
                return known
            if known is not None:
                self._forget(known)
            found = self._models[model] = ModelSnapshots(self, model, fingerprint)
            found.had_others = known is not None
        found.scanned = self._writer.submit(self._scan, found)
        return found

    def _forget(self, model: "ModelSnapshots") -> None:
        for block in [block for block, owner in self._held.items() if owner is model]:
            del self._held[block]
            self._held_bytes -= block.size_bytes

    def _scan(self, model: "ModelSnapshots") -> None:
        try:
            files, others = self.folder.scan(model.name, model.fingerprint)
        except OSError as problem:
            logger.warning("computed prefixes cannot be listed: %s", problem)
            return
        with self.lock:
            model.had_others |= others > 0
            for path, head in files.items():
                model.index.add(
                    Block(
                        head.key, head.parent, head.number, head.tokens, head.state_bytes,
                        path=path, head=head,
                    )
                )  # fmt: skip

    def put(self, model: "ModelSnapshots", block: Block) -> None:
        """Take a block with its state, which is kept and written later.  The lock is held."""
        self._waiting.append((model, block))
        self._waiting_bytes += block.size_bytes
        self._writer.submit(self._store)

    def has_room(self) -> bool:
        """Whether more blocks may be put: the writing keeps up."""
        return self._waiting_bytes < _MOST_WAITING_BYTES

    def wait_for_room(self, timeout_s: float) -> None:
        """Block until there is room, at most so long."""
        with self._room:
            self._room.wait_for(self.has_room, timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Block until all that was put is written, at most so long; False when it is not."""
        with self._room:
            return self._room.wait_for(lambda: not self._waiting_bytes, timeout_s)

    def touch(self, blocks: Sequence[Block]) -> None:
        """Note that a chain is used: its first block will be the last to go."""
        with self.lock:
            for block in reversed(blocks):
                if block in self._held:
                    self._held.move_to_end(block)
        self._writer.submit(self._touch_files, list(blocks))

    def _touch_files(self, blocks: Sequence[Block]) -> None:
        self.folder.touch([block.path for block in blocks if block.path is not None])

    def _store(self) -> None:
        """Write some of what waits, all of one model, and keep it in RAM as far as allowed."""
        with self.lock:
            if not self._waiting:
                return
            model, batch = self._waiting[0][0], list[Block]()
            while self._waiting and self._waiting[0][0] is model and len(batch) < _BATCH:
                batch.append(self._waiting.popleft()[1])
        for work in (self._write, self._keep):
            try:
                work(model, batch)
            except OSError as problem:
                logger.warning("computed prefixes cannot be kept: %s", problem)
        with self._room:
            self._waiting_bytes -= sum(block.size_bytes for block in batch)
            for block in batch:
                if block not in self._held:
                    block.state = None
                self._settle(model, block)
            self._room.notify_all()

    def _write(self, model: "ModelSnapshots", batch: Sequence[Block]) -> None:
        for block in batch:
            assert block.state is not None
            block.head = head_of(
                model.fingerprint, block.parent, block.number, block.tokens, block.state
            )
        written = self.folder.write(
            model.name, [(b.head, b.state) for b in batch if b.head and b.state is not None]
        )
        with self.lock:
            for block in batch:
                block.path = written.paths.get(block.key)
            if not written.dropped:
                return
            for other in self._models.values():
                for block in other.index.blocks():
                    if block.path in written.dropped:
                        block.path = None
                        self._settle(other, block)

    def _keep(self, model: "ModelSnapshots", batch: Sequence[Block]) -> None:
        if not self._limit_bytes:
            return
        wanted = self._held_bytes + sum(block.size_bytes for block in batch)
        granted = self.folder.claim_ram(min(wanted, self._limit_bytes), self._limit_bytes)
        with self.lock:
            for block in batch:
                self._held[block] = model
                self._held_bytes += block.size_bytes
            while self._held_bytes > granted:
                oldest, owner = self._held.popitem(last=False)
                self._held_bytes -= oldest.size_bytes
                oldest.state = None
                self._settle(owner, oldest)

    @staticmethod
    def _settle(model: "ModelSnapshots", block: Block) -> None:
        """Drop a block from the index that is nowhere any more."""
        if block.state is None and block.path is None:
            model.index.drop(block)

    def read(self, model: "ModelSnapshots", block: Block) -> tuple[State, bool] | None:
        """Return a block's state and whether it was in RAM; None where it is lost.  Blocks."""
        with self.lock:
            state, path, head = block.state, block.path, block.head
        if state is not None:
            return state, True
        if path is not None and head is not None:
            state = self.folder.read(path, head)
        if state is None:
            with self.lock:
                block.path = None
                self._settle(model, block)
            return None
        return state, False

    def close(self) -> None:
        """Finish what waits and end the threads; twice is fine."""
        self._writer.shutdown()
        self.reader.shutdown(cancel_futures=True)


class ModelSnapshots:
    """The blocks of one version of one model; thread-safe."""

    def __init__(self, store: Snapshots, name: str, fingerprint: bytes) -> None:
        self.store = store
        self.name = name
        self.fingerprint = fingerprint
        self.index = BlockIndex()
        self.had_others = False
        self.scanned: Future[None] | None = None

    def chain(self, tokens: "array[int]") -> list[Block]:
        """Return the blocks of the longest known beginning of `tokens`."""
        if self.scanned is not None and not self.scanned.done():
            wait_for(self.scanned, _SCAN_LIMIT_S)
        with self.store.lock:
            return self.index.chain(tokens)

    def missing(self, tokens: "array[int]") -> list[int]:
        """Return the numbers of the whole blocks of `tokens` that are not known."""
        return list(range(len(self.chain(tokens)), len(tokens) // BLOCK_TOKENS))

    def put(self, tokens: "array[int]", number: int, state: State) -> None:
        """Take the state of block `number` of `tokens`, which is not copied."""
        end = (number + 1) * BLOCK_TOKENS
        keys = block_keys(tokens[:end])
        block = Block(
            keys[number],
            keys[number - 1] if number else ROOT,
            number,
            tokens[end - BLOCK_TOKENS : end],
            state.nbytes,
            state,
        )
        with self.store.lock:
            if self.index.add(block):
                self.store.put(self, block)

    def touch(self, tokens: "array[int]") -> None:
        """Note that the known beginning of `tokens` is used."""
        self.store.touch(self.chain(tokens))

    def why_absent(self, tokens: "array[int]", count: int) -> MissReason:
        """Return why the block after the first `count` of this prompt is not known."""
        with self.store.lock:
            if self.index.was_dropped(tokens, count):
                return "evicted"
            return "other_model_version" if self.had_others else "no_snapshot"

    def nearest(self, tokens: "array[int]", count: int) -> tuple[int, "array[int]"]:
        """Return what some known prompt shares beyond `count` blocks; see `BlockIndex.nearest`."""
        with self.store.lock:
            return self.index.nearest(tokens, count)


@dataclass(frozen=True, slots=True)
class SnapshotPlace:
    """Where an engine finds the blocks of its model; `marks` tell the model's files apart."""

    store: Snapshots
    model: str
    marks: str

    def open(self, layout: str) -> ModelSnapshots:
        """Return the blocks that fit a runtime whose versions and cache `layout` describes."""
        return self.store.of(self.model, sha256(f"{self.marks}\n{layout}".encode()).digest())


def wait_for(future: "Future[None]", timeout_s: float) -> None:
    """Wait for a future at most so long, whatever becomes of it."""
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    done.wait(timeout_s)
