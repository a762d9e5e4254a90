"""How a sequence of a GGUF engine gets what is known of its prompt."""

from backends.gguf.blocks import CellBlocks
from backends.gguf.rows import Queues, Row
from backends.gguf.slots import KvSlots
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.match import Retained, common_prefix
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.reuse import Reuse
from backends.prefixes.store import State
from backends.prefixes.transfer import SnapshotFlow, is_worth_it


class Placement:
    """Gives rows their slots, with the longest prefix that slots, RAM, disk or rows know."""

    def __init__(
        self,
        queues: Queues,
        slots: KvSlots,
        blocks: CellBlocks,
        flow: SnapshotFlow[Retained],
        *,
        can_share_running: bool,
    ) -> None:
        self._queues = queues
        self._slots = slots
        self._blocks = blocks
        self._flow = flow
        self._can_share_running = can_share_running

    def place(self, row: Row, step: int) -> bool:
        """Give `row` a slot holding the longest known prefix; False when no slot is free.

        1. A finished row's cells, all shared: take its slot over.
        2. A finished or running row's cells: share them.
        3. A snapshot in RAM, where that is longer: copy it into cells.
        4. Blocks that outlived an engine, where those are longer: restore them step by step.
        """
        limit = len(row.tokens) - 1
        prompt = row.tokens[:limit]
        entry, kept = self._slots.longest(prompt)
        leader, computed, potential = self._best_leader(row, limit)
        snapshot, stored = self._slots.longest_stored(prompt)
        offered = self._flow.known(prompt)
        likely = max(kept, potential, stored)
        use_blocks = is_worth_it(offered, likely)
        use_snapshot = not use_blocks and stored >= max(kept, computed) + SMALLEST_PREFIX
        reuse = self._explained(row, len(offered) * BLOCK_TOKENS if use_blocks else likely)
        is_whole = entry is not None and kept == len(entry.tokens) >= computed
        if entry is not None and is_whole and not (use_snapshot or use_blocks):  # (1)
            row.slot, row.past = self._slots.take_over(entry), kept
        elif not self._take_slot(row, but=entry):
            return False
        elif use_blocks:  # (4)
            row.incoming = self._flow.restore(prompt, offered)
        elif use_snapshot and snapshot is not None:  # (3)
            row.past = stored if self._slots.restore(snapshot, row.slot, stored, step) else 0
        elif entry is not None and kept >= computed and self._slots.is_retained(entry):  # (2)
            entry.used_at_step = step
            self._share(row, entry.slot, kept)
        elif leader is not None and computed:
            self._share(row, leader.slot, computed)
        if leader is not None and not use_blocks and potential - row.past >= SMALLEST_PREFIX:
            row.leader, row.shared = leader, potential
        row.reuse = row.reuse if row.is_counted else reuse
        row.note(**{"ram" if use_snapshot else "cells": row.past})
        return True

    def _explained(self, row: Row, planned: int) -> Reuse:
        """Return why no more than `planned` tokens of the row's prompt will be reused."""
        running = (other.tokens for other in self._queues.running)
        return self._flow.explained(planned, row.tokens, [*self._slots.known(), *running])

    def _take_slot(self, row: Row, *, but: Retained | None) -> bool:
        slot = self._slots.take(but=but)
        if slot is None:
            return False
        row.slot = slot
        return True

    def _best_leader(self, row: Row, limit: int) -> tuple[Row | None, int, int]:
        """Return the running row that shares most, what of it is computed and what will be."""
        best: tuple[Row | None, int, int] = (None, 0, 0)
        if not self._can_share_running:
            return best
        for other in self._queues.running:
            potential = min(common_prefix(other.tokens, row.tokens), limit)
            if potential > best[2]:
                best = (other, min(potential, other.past), potential)
        return best

    def _share(self, row: Row, source_slot: int, count: int) -> None:
        self._slots.share(source_slot, row.slot, count)
        row.past = count

    def follow(self, row: Row) -> bool:
        """Return whether `row` still waits for its leader; take the shared prefix when ready."""
        leader = row.leader
        if leader is None:
            return False
        is_alive = leader.slot >= 0 and leader.past < len(leader.tokens)
        if is_alive and leader.past < row.shared:
            return True
        ready = min(leader.past, row.shared) if leader.slot >= 0 else 0
        if ready > row.past:
            self._share(row, leader.slot, ready)
            row.note(cells=ready)
        row.leader = None
        return False

    def receive(self, row: Row) -> bool:
        """Return whether more of the row's prefix is to come; put what arrived into its cells."""
        if row.incoming is None:
            return False
        reuse = Reuse() if row.is_counted else row.reuse
        row.incoming.receive(reuse, lambda state: self._load(row, state))
        if row.incoming.is_over:
            row.incoming = None
        return row.incoming is not None

    def _load(self, row: Row, state: State) -> bool:
        while not self._blocks.restore(row.slot, state):
            if not self._slots.drop_oldest():
                return False
        row.past += BLOCK_TOKENS
        return True
