"""Places a row in a KV slot with the longest cached prefix: cells, RAM, disk or another row."""

from backends.engine.row_book import RowBook
from backends.gguf.blocks import CellBlocks
from backends.gguf.rows import GgufRow
from backends.gguf.slots import KvSlots
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.match import Retained
from backends.prefixes.pieces import PieceRule
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.reuse import Reuse
from backends.prefixes.store import State
from backends.prefixes.transfer import Applied, PrefixTransfer, is_worth_restoring


class Placement:
    """Gives each row a slot, with the longest prefix from cells, RAM, disk or running rows."""

    def __init__(
        self,
        book: RowBook[GgufRow],
        slots: KvSlots,
        blocks: CellBlocks,
        transfer: PrefixTransfer[Retained],
        rule: PieceRule,
        *,
        can_share_running: bool,
        cells: int,
    ) -> None:
        """`cells` is the size of the context's KV cache in tokens."""
        self._book = book
        self._slots = slots
        self._blocks = blocks
        self._transfer = transfer
        self._rule = rule
        self._can_share_running = can_share_running
        self._cells = cells

    def place(self, row: GgufRow, step: int) -> bool:
        """Give `row` a slot with the longest cached prefix; False if no slot is free.

        1. Cells of a finished row that are all shared: take over its slot.
        2. Cells of a finished or running row: share them.
        3. A prefix in RAM, if it is longer: copy it into cells.
        4. Stored blocks of a former engine, if they are longer: restore them step by step.

        A request that reads no cache gets an empty slot.
        """
        if self._rule.is_fixed:
            self._place_in_pieces(row, step)
            return True
        if row.needs_scores or not row.spec.reads_cache:
            return self._place_empty(row)
        limit = len(row.tokens) - 1
        prompt = row.tokens[:limit]
        entry, kept = self._slots.longest(prompt)
        leader, potential = self._book.best_leader(row) if self._can_share_running else (None, 0)
        computed = min(potential, leader.past) if leader is not None else 0
        prefix, stored = self._slots.longest_stored(prompt)
        stored_blocks = self._transfer.find(prompt)
        likely = max(kept, potential, stored)
        use_blocks = is_worth_restoring(stored_blocks, likely)
        use_ram_prefix = not use_blocks and stored >= max(kept, computed) + SMALLEST_PREFIX
        reuse = self._explained(row, len(stored_blocks) * BLOCK_TOKENS if use_blocks else likely)
        is_whole = entry is not None and kept == len(entry.tokens) >= computed
        if entry is not None and is_whole and not (use_ram_prefix or use_blocks):  # (1)
            row.slot, row.past = self._slots.take_over(entry), kept
        elif not self._take_slot(row, but=entry):
            return False
        elif use_blocks:  # (4)
            row.incoming = self._transfer.restore(prompt, stored_blocks)
        elif use_ram_prefix and prefix is not None:  # (3)
            row.past = stored if self._slots.restore(prefix, row.slot, stored, step) else 0
        elif entry is not None and kept >= computed and self._slots.is_retained(entry):  # (2)
            entry.used_at_step = step
            self._share(row, entry.slot, kept)
        elif leader is not None and computed:
            self._share(row, leader.slot, computed)
        if leader is not None and not use_blocks:
            row.wait_for(leader, potential)
        row.reuse = row.reuse if row.is_reuse_final else reuse
        row.note_reuse(**{"ram" if use_ram_prefix else "cells": row.past})
        return True

    def _place_in_pieces(self, row: GgufRow, step: int) -> None:
        """Give `row` all cells, which hold whole pieces of a cached prefix or nothing.

        Attention adds up the cells in their order, those of other rows as well.
        """
        if row.needs_scores or not row.spec.reads_cache:
            self._slots.empty()
            self.place_alone(row)
            return
        prompt = row.tokens[: len(row.tokens) - 1]
        entry, kept = self._slots.longest(prompt)
        prefix, stored = self._slots.longest_stored(prompt)
        kept, stored = self._rule.whole(kept), self._rule.whole(stored)
        blocks = self._rule.blocks(self._transfer.find(prompt))
        use_blocks = is_worth_restoring(blocks, max(kept, stored))
        use_ram_prefix = not use_blocks and stored >= kept + SMALLEST_PREFIX
        planned = len(blocks) * BLOCK_TOKENS if use_blocks else max(kept, stored)
        reuse = self._explained(row, planned)
        if entry is not None and kept and not (use_blocks or use_ram_prefix):
            row.slot, row.past = self._slots.cut_to(entry, kept), kept
        else:
            self._slots.empty()
            self.place_alone(row)
            if use_blocks:
                row.incoming = self._transfer.restore(prompt, blocks)
            elif use_ram_prefix and prefix is not None:
                row.past = stored if self._slots.restore(prefix, row.slot, stored, step) else 0
        row.reuse = row.reuse if row.is_reuse_final else reuse
        row.note_reuse(**{"ram" if use_ram_prefix else "cells": row.past})

    def place_alone(self, row: GgufRow) -> None:
        """Give `row` an empty slot, with nothing reused; no other row may run."""
        if not self._place_empty(row):
            raise AssertionError("no slot is free although no row runs")

    def _place_empty(self, row: GgufRow) -> bool:
        if not self._take_slot(row, but=None):
            return False
        row.past = 0
        row.note_reuse()
        return True

    def _explained(self, row: GgufRow, planned: int) -> Reuse:
        """Return the `Reuse` with the reason why only `planned` prompt tokens are reused."""
        known = [*self._slots.known(), *self._book.running_tokens()]
        return self._transfer.explain_reuse(planned, row.tokens, known)

    def _take_slot(self, row: GgufRow, *, but: Retained | None) -> bool:
        slot = self._slots.take(but=but)
        if slot is None:
            return False
        row.slot = slot
        return True

    def _share(self, row: GgufRow, source_slot: int, count: int) -> None:
        self._slots.share(source_slot, row.slot, count)
        row.past = count

    def is_ready(self, row: GgufRow) -> bool:
        """Return whether `row` can be computed now: it waits for no restore and no leader."""
        if row.receive(self._load) or row.follow(self._share_from_leader):
            return False
        if row.scores is None and self._rule.whole(row.past) < row.past:
            # The rest of a piece is computed with its beginning, so nothing of it is used.
            self._slots.release(row.release_slot())
            self._slots.empty()
            self.place_alone(row)
        return True

    def _share_from_leader(self, row: GgufRow, source_slot: int, count: int) -> None:
        if count > row.past:
            self._share(row, source_slot, count)
            row.note_reuse(cells=count)

    def _load(self, row: GgufRow, state: State) -> Applied:
        while not self._blocks.restore(row.slot, state):
            lacks_room = self._blocks.lacks_room
            # Retained prefixes give way to a block that lacks room, not to one that is refused.
            if not (self._may_lack_room() if lacks_room is None else lacks_room):
                return "refused"
            if not self._slots.drop_oldest():
                return "no_room"
        row.past += BLOCK_TOKENS
        return "applied"

    def _may_lack_room(self) -> bool:
        """Whether a block may not fit: shared cells are counted for each of their users."""
        used = self._book.past_tokens + self._slots.retained_tokens
        return used + BLOCK_TOKENS > self._cells
