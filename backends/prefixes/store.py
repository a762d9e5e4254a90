"""Store of computed prefixes that outlive their engine: blocks in RAM and on disk.

A prefix is a chain of blocks of `BLOCK_TOKENS` tokens.  Conversations with a common beginning
share their first blocks, and each turn of a conversation adds only its own blocks.
"""

import logging
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.prefixes.block_file import (
    BLOCK_TOKENS,
    FINGERPRINT_BYTES,
    ROOT,
    VERSION_BYTES,
    block_head,
    block_keys,
)
from backends.prefixes.disk import PrefixFolder, drop_file
from backends.prefixes.index import Block, BlockIndex
from core.types import MissReason
from core.units import MIB

logger = logging.getLogger(__name__)

State: TypeAlias = NDArray[np.uint8]

# How long a lookup waits for the scan of the model's files, which runs while it is opened.
_SCAN_LIMIT_S = 2.0
# Limit of bytes waiting to be written; above it nothing is copied out of engines.
_MAX_WAITING_BYTES = 64 * MIB
_BATCH = 8


class BlockStore:
    """The blocks of all models of one process: up to `ram_bytes` in RAM, others in `folder`.

    The RAM limit is shared with other processes that use the same folder.  Files are written and
    listed on one thread and read on another, so callers do not block on the disk.
    """

    def __init__(self, folder: PrefixFolder, ram_bytes: int) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self._limit_bytes = ram_bytes
        self._in_ram: OrderedDict[Block, ModelBlocks] = OrderedDict()
        self._ram_bytes = 0
        self._waiting: deque[tuple[ModelBlocks, Block]] = deque()
        self._waiting_bytes = 0
        self._room_freed = threading.Condition(self.lock)
        self._models: dict[str, ModelBlocks] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="impetus-prefix-w")
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="impetus-prefix-r")

    @property
    def ram_bytes(self) -> int:
        """Bytes of blocks in RAM, without those waiting to be written."""
        return self._ram_bytes

    def of(self, model: str, fingerprint: bytes) -> "ModelBlocks":
        """Return the blocks of `<model>-<layout>`.

        Blocks of another version of the model's files are dropped, those of another layout kept.
        """
        family = model.partition("-")[0]
        with self.lock:
            known = self._models.get(model)
            if known is not None and known.fingerprint == fingerprint:
                return known
            found = ModelBlocks(self, model, fingerprint)
            for name, other in list(self._models.items()):
                if name.partition("-")[0] != family:
                    continue
                found.index.note_absent(other.index.keys(), "other_model_version")
                if name == model or not other.has_version_of(fingerprint):
                    self._forget(self._models.pop(name))
            self._models[model] = found
        found.scanned = self.submit(self._scan, found)
        return found

    def submit(self, work: Callable[..., object], *values: Any) -> Future[object] | None:
        """Run `work` on the writer's thread; None if the store is closed or threads lack."""
        try:
            return self._writer.submit(work, *values)
        except RuntimeError as problem:
            logger.warning("prefix blocks are not kept: %s", problem)
            return None

    def _forget(self, model: "ModelBlocks") -> None:
        for block in [block for block, owner in self._in_ram.items() if owner is model]:
            self._remove_from_ram(block)

    def _remove_from_ram(self, block: Block) -> None:
        if self._in_ram.pop(block, None) is not None:
            self._ram_bytes -= block.size_bytes

    def _scan(self, model: "ModelBlocks") -> None:
        try:
            files, others = self.folder.scan(model.name, model.fingerprint)
        except OSError as problem:
            logger.warning("prefix blocks on disk cannot be listed and are not used: %s", problem)
            return
        with self.lock:
            model.index.note_absent(others, "other_model_version")
            for path, head in files.items():
                model.index.add(
                    Block(
                        head.key, head.parent, head.number, head.tokens, head.state_bytes,
                        path=path, head=head,
                    )
                )  # fmt: skip

    def put(self, model: "ModelBlocks", block: Block) -> None:
        """Queue a block with its state for RAM and disk.  The caller holds the lock."""
        self._waiting.append((model, block))
        self._waiting_bytes += block.size_bytes
        if self.submit(self._store) is None:
            self._waiting.pop()
            self._waiting_bytes -= block.size_bytes
            block.state = None
            self._drop_if_lost(model, block)

    def has_room(self) -> bool:
        """Whether more blocks may be queued for writing."""
        return self._waiting_bytes < _MAX_WAITING_BYTES

    def wait_for_room(self, timeout_s: float) -> None:
        """Block until there is room, or until the timeout."""
        with self._room_freed:
            self._room_freed.wait_for(self.has_room, timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Block until all queued blocks are written; return False at the timeout."""
        with self._room_freed:
            return self._room_freed.wait_for(lambda: not self._waiting_bytes, timeout_s)

    def touch(self, blocks: Sequence[Block]) -> None:
        """Mark a chain of blocks as used; its first block will be evicted last."""
        with self.lock:
            for block in reversed(blocks):
                if block in self._in_ram:
                    self._in_ram.move_to_end(block)
        self.submit(self._touch_files, list(blocks))

    def _touch_files(self, blocks: Sequence[Block]) -> None:
        self.folder.touch([block.path for block in blocks if block.path is not None])

    def _store(self) -> None:
        """Write a batch of queued blocks of one model, and keep them in RAM within the limit."""
        with self.lock:
            if not self._waiting:
                return
            model, batch = self._waiting[0][0], list[Block]()
            while self._waiting and self._waiting[0][0] is model and len(batch) < _BATCH:
                batch.append(self._waiting.popleft()[1])
        for work in (self._write, self._keep):
            try:
                work(model, batch)
            except Exception:
                # Whatever it is, the blocks that wait must be counted down, or nothing is stored.
                logger.warning("prefix blocks cannot be stored", exc_info=True)
        with self._room_freed:
            self._waiting_bytes -= sum(block.size_bytes for block in batch)
            for block in batch:
                if block not in self._in_ram:
                    block.state = None
                self._drop_if_lost(model, block)
            self._room_freed.notify_all()

    def _write(self, model: "ModelBlocks", batch: Sequence[Block]) -> None:
        pairs = []
        for block in batch:
            # It was dropped while it waited.
            if (state := block.state) is None:
                continue
            block.head = block_head(
                model.fingerprint, block.parent, block.number, block.tokens, state
            )
            pairs.append((block.head, state))
        written = self.folder.write(model.name, pairs)
        with self.lock:
            for block in batch:
                path = written.paths.get(block.key)
                if path is not None and not model.index.has(block):
                    self.submit(drop_file, path)
                    path = None
                block.path = path
            if not written.dropped:
                return
            for other in self._models.values():
                for block in other.index.blocks():
                    if block.path in written.dropped:
                        block.path = None
                        self._drop_if_lost(other, block)

    def _keep(self, model: "ModelBlocks", batch: Sequence[Block]) -> None:
        if not self._limit_bytes:
            return
        wanted = self._ram_bytes + sum(block.size_bytes for block in batch)
        granted = self.folder.claim_ram(min(wanted, self._limit_bytes), self._limit_bytes)
        with self.lock:
            for block in batch:
                if block.state is not None and model.index.has(block):
                    self._in_ram[block] = model
                    self._ram_bytes += block.size_bytes
            while self._ram_bytes > granted:
                oldest, owner = self._in_ram.popitem(last=False)
                self._ram_bytes -= oldest.size_bytes
                oldest.state = None
                self._drop_if_lost(owner, oldest)

    @staticmethod
    def _drop_if_lost(model: "ModelBlocks", block: Block, reason: MissReason = "evicted") -> None:
        """Drop a block from the index if it is neither in RAM nor on disk."""
        if block.state is None and block.path is None:
            model.index.drop(block, reason)

    def drop(self, model: "ModelBlocks", blocks: Sequence[Block]) -> None:
        """Drop blocks that a runtime refused, with their files; they can be stored again."""
        with self.lock:
            paths = [block.path for block in blocks if block.path is not None]
            for block in blocks:
                self._remove_from_ram(block)
                block.state = block.path = None
                model.index.drop(block, "damaged")
        for path in paths:
            self.submit(drop_file, path)

    def read(self, model: "ModelBlocks", block: Block) -> tuple[State, bool] | MissReason:
        """Return a block's state and whether it was in RAM, or why it is lost.  Blocks."""
        with self.lock:
            state, path, head = block.state, block.path, block.head
        if state is not None:
            return state, True
        if path is None or head is None:
            reason: MissReason = "evicted"
        else:
            found = self.folder.read(path, head)
            if not isinstance(found, str):
                return found, False
            reason = found
        # For want of memory it cannot be read now, but it is there.
        if reason != "no_room":
            with self.lock:
                block.path = None
                self._drop_if_lost(model, block, reason)
        return reason

    def close(self) -> None:
        """Write all queued blocks and stop the threads; idempotent."""
        self._writer.shutdown()
        self.reader.shutdown(cancel_futures=True)


class ModelBlocks:
    """The blocks of one version of one model; thread-safe."""

    def __init__(self, store: BlockStore, name: str, fingerprint: bytes) -> None:
        self.store = store
        self.name = name
        self.fingerprint = fingerprint
        self.index = BlockIndex()
        self.scanned: Future[object] | None = None

    def has_version_of(self, fingerprint: bytes) -> bool:
        """Whether these blocks belong to the same version of the model's files."""
        return self.fingerprint[:VERSION_BYTES] == fingerprint[:VERSION_BYTES]

    def chain(self, tokens: "array[int]") -> list[Block]:
        """Return the longest chain of known blocks at the start of `tokens`."""
        # Only the first lookup waits: a disk that hangs must not delay every request.
        scanned, self.scanned = self.scanned, None
        if scanned is not None and not scanned.done():
            wait_for(scanned, _SCAN_LIMIT_S)
        with self.store.lock:
            return self.index.chain(tokens)

    def missing(self, tokens: "array[int]") -> list[int]:
        """Return the numbers of the full blocks of `tokens` that are not stored."""
        return list(range(len(self.chain(tokens)), len(tokens) // BLOCK_TOKENS))

    def put(self, tokens: "array[int]", number: int, state: State) -> None:
        """Store the state of block `number` of `tokens`; keeps a reference, not a copy."""
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
        """Mark the stored blocks at the start of `tokens` as used."""
        self.store.touch(self.chain(tokens))

    def drop(self, blocks: Sequence[Block]) -> None:
        """Drop blocks that the runtime refused; see `BlockStore.drop`."""
        self.store.drop(self, blocks)

    def why_absent(self, tokens: "array[int]", number: int) -> MissReason:
        """Return why block `number` of this prompt is not stored."""
        with self.store.lock:
            return self.index.why_absent(tokens, number)

    def nearest(self, tokens: "array[int]", count: int) -> tuple[int, "array[int]"]:
        """Return the nearest known prompt beyond `count` blocks; see `BlockIndex.nearest`."""
        with self.store.lock:
            return self.index.nearest(tokens, count)


@dataclass(frozen=True, slots=True)
class ModelPrefixStore:
    """The store as seen by one model; `file_versions` identifies the version of its files."""

    store: BlockStore
    model: str
    file_versions: str

    def open(self, layout: str) -> ModelBlocks:
        """Return the blocks for a runtime whose versions and cache shape `layout` describes."""
        version, shape = (sha256(text.encode()).digest() for text in (self.file_versions, layout))
        fingerprint = version[:VERSION_BYTES] + shape[: FINGERPRINT_BYTES - VERSION_BYTES]
        return self.store.of(f"{self.model}-{shape.hex()[:16]}", fingerprint)


def wait_for(future: "Future[object]", timeout_s: float) -> None:
    """Wait for a future to end, or for the timeout; ignores its result."""
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    done.wait(timeout_s)
