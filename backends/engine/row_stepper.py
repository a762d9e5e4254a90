"""Continuous batching over any runtime that computes rows of tokens: a `Stepper`."""

import time

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineLoad, EngineOptions
from backends.engine.prefill import PrefillPlanner
from backends.engine.row_model import Pieces, PortableRows, RowInput, RowModel
from backends.engine.rows import Kept, PlannedStepper, Row, Rows
from backends.engine.sampling import RowSampler
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.match import common_prefix, longest_prefix, token_array
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.reuse import Reuse
from backends.prefixes.store import State
from backends.prefixes.transfer import SnapshotFlow, await_first, is_worth_it
from backends.stepper import SequenceSpec, StepOutput
from core.errors import EngineFailed


class RowStepper(PlannedStepper):
    """Runs up to `max_sequences` rows; each step appends to all that are ready in one call.

    Every step decodes one token of each running row and a bounded chunk of waiting prompts.
    A new row gets the longest computed prefix of any running or finished row.  When the tokens
    of all rows exceed `options.kv_tokens`, finished rows go first, then the youngest running row
    gives its cache back and is computed again later: it waits, nothing fails.
    """

    def __init__(self, model: RowModel, pieces: Pieces, options: EngineOptions) -> None:
        """Take the model over; `options` must have its context and KV tokens decided."""
        assert options.kv_tokens is not None
        self._model = model
        self._pieces = pieces
        self._kv_tokens = options.kv_tokens
        self.max_sequences = min(options.max_sequences, model.max_rows)
        self._planner = PrefillPlanner(options.prefill_chunk_tokens)
        portable = model if isinstance(model, PortableRows) else None
        self._portable = portable
        self._flow = SnapshotFlow[Kept](
            options.snapshots, portable.layout if portable else None, self._block
        )
        self._rows = Rows()
        self._steps = 0
        self._preemptions = 0

    def add(self, spec: SequenceSpec) -> None:
        """Accept a sequence; it starts as soon as there is room.  Raises RequestError."""
        sampler = RowSampler(
            spec, self._model.vocabulary_size, lambda token: self._pieces.piece(token, special=True)
        )
        row = Row(spec, token_array(spec.prompt), sampler)
        self._rows.by_id[spec.id] = row
        self._rows.waiting.append(row)

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; what it computed stays as a prefix for later ones.  Idempotent."""
        row = self._rows.by_id.pop(sequence_id, None)
        if row is None:
            return
        if row.row < 0:
            self._rows.waiting.remove(row)
            return
        self._rows.running.remove(row)
        self._rows.is_crowded = False
        row.stop_restoring()
        if row.past >= SMALLEST_PREFIX:
            kept = Kept(row.row, row.tokens[: row.past], self._steps)
            self._rows.kept.append(kept)
            self._flow.keep(kept, kept.tokens)
        else:
            self._model.close_row(row.row)
        row.row = -1

    def step(self) -> list[StepOutput]:
        """Do one forward pass.  Raises EngineFailed when the runtime fails."""
        self._admit()
        chunks = self._chunks()
        while self._used() + sum(count for _, count in chunks) > self._kv_tokens:
            self._make_room()
            chunks = self._chunks()
        if not chunks:
            await_first([row.incoming for row in self._rows.running])
            return []
        inputs = [RowInput(row.row, row.tokens[row.past : row.past + n]) for row, n in chunks]
        started = time.monotonic()
        logits = self._model.extend(inputs)
        self._steps += 1
        outputs = [self._collect(row, n, logits[i]) for i, (row, n) in enumerate(chunks)]
        self._planner.observe(sum(n for _, n in chunks), time.monotonic() - started)
        self._flow.tend()
        return outputs

    def _used(self) -> int:
        rows = self._rows
        return sum(row.past for row in rows.running) + sum(len(kept.tokens) for kept in rows.kept)

    def _admit(self) -> None:
        rows = self._rows
        if rows.is_crowded and rows.running:
            return
        while rows.waiting and len(rows.running) < self.max_sequences:
            row = rows.waiting.pop(0)
            self._place(row)
            rows.running.append(row)

    def _place(self, row: Row) -> None:
        """Give `row` a row of the model that holds the longest known prefix.

        1. A finished row, all of it shared, or none may stay beside it: take it over.
        2. A finished or running row: copy the shared part.
        3. Blocks that outlived an engine, where those are longer: restored step by step.
        4. Nothing to share: an empty row.
        """
        limit = len(row.tokens) - 1
        kept, length = longest_prefix(self._rows.kept, row.tokens[:limit], 1 << 30)
        leader, computed, potential = self._best_leader(row, limit)
        if length < SMALLEST_PREFIX:
            kept, length = None, 0
        blocks = self._flow.known(row.tokens[:limit])
        use_blocks = is_worth_it(blocks, max(length, potential))
        planned = len(blocks) * BLOCK_TOKENS if use_blocks else max(length, potential)
        reuse = self._flow.explained(planned, row.tokens, self._rows.known())
        if use_blocks:
            row.incoming = self._flow.restore(row.tokens[:limit], blocks)  # (3)
        elif kept is not None and length >= computed:
            is_whole = length == len(kept.tokens)
            if is_whole or not self._copy(row, kept.row, length):
                self._take_over(row, kept, length)  # (1)
            else:
                kept.used_at_step = self._steps
        elif leader is not None and computed >= SMALLEST_PREFIX:
            self._copy(row, leader.row, computed)  # (2)
        if row.row < 0:
            self._free_a_row()
            row.row, row.past = self._model.open_row(row.capacity), 0  # (4)
        if leader is not None and not use_blocks and potential - row.past >= SMALLEST_PREFIX:
            row.leader, row.shared = leader, potential
        if not row.is_counted:
            reuse.cells = row.past
            row.reuse = reuse

    def _best_leader(self, row: Row, limit: int) -> tuple[Row | None, int, int]:
        """Return the running row that shares most, what of it is computed and what will be."""
        best: tuple[Row | None, int, int] = (None, 0, 0)
        for other in self._rows.running:
            potential = min(common_prefix(other.tokens, row.tokens), limit)
            if potential > best[2]:
                best = (other, min(potential, other.past), potential)
        return best

    def _take_over(self, row: Row, kept: Kept, length: int) -> None:
        self._rows.kept.remove(kept)
        # Whoever goes on with the row has all of it kept at its end.
        self._flow.forget(kept)
        if length == len(kept.tokens) or self._model.truncate(kept.row, length):
            row.row, row.past = kept.row, length
        else:
            self._model.close_row(kept.row)

    def _copy(self, row: Row, source: int, length: int) -> bool:
        if self._rows.open_count >= self._model.max_rows:
            spare = [kept for kept in self._rows.kept if kept.row != source]
            if not spare:
                return False
            self._drop(min(spare, key=lambda kept: kept.used_at_step))
        if self._used() + length > self._kv_tokens:
            return False
        copied = self._model.copy_row(source, length, row.capacity)
        if copied is None:
            return False
        row.row, row.past = copied, length
        return True

    def _free_a_row(self) -> None:
        while self._rows.kept and self._rows.open_count >= self._model.max_rows:
            self._drop(self._rows.oldest())

    def _drop(self, kept: Kept) -> None:
        self._rows.kept.remove(kept)
        self._flow.forget(kept)
        self._model.close_row(kept.row)

    def _follow(self, row: Row) -> bool:
        """Return whether `row` still waits for its leader; copy the shared prefix when ready."""
        leader = row.leader
        if leader is None:
            return False
        if leader.row >= 0 and leader.pending > 1 and leader.past < row.shared:
            return True
        row.leader = None
        ready = min(leader.past, row.shared) if leader.row >= 0 else 0
        if ready - row.past < SMALLEST_PREFIX:
            return False
        before, known = row.row, row.past
        # The row it has is given back only once the copy stands.
        if self._copy(row, leader.row, ready):
            self._model.close_row(before)
        else:
            row.row, row.past = before, known
        if not row.is_counted:
            row.reuse.only_cells(row.past)
        return False

    def _block(self, kept: Kept, number: int) -> State:
        assert self._portable is not None
        return self._portable.read_tokens(kept.row, number * BLOCK_TOKENS, BLOCK_TOKENS)

    def _receive(self, row: Row) -> bool:
        """Return whether more of the row's prefix is to come; append what arrived."""
        if row.incoming is None:
            return False
        reuse = Reuse() if row.is_counted else row.reuse
        row.incoming.receive(reuse, lambda state: self._append(row, state))
        if row.incoming.is_over:
            row.incoming = None
        return row.incoming is not None

    def _append(self, row: Row, state: State) -> bool:
        while self._used() + BLOCK_TOKENS > self._kv_tokens:
            if not self._rows.kept:
                return False
            self._drop(self._rows.oldest())
        assert self._portable is not None
        is_read = self._portable.append_tokens(row.row, BLOCK_TOKENS, state)
        row.past += BLOCK_TOKENS * is_read
        return is_read

    def _chunks(self) -> list[tuple[Row, int]]:
        """Return how many tokens each row gets in this step, decoding rows first."""
        decoding = [row for row in self._rows.running if row.pending == 1]
        waiting = [row for row in self._rows.running if row.pending > 1]
        prefilling = [row for row in waiting if not (self._receive(row) or self._follow(row))]
        counts = self._planner.plan([row.pending for row in prefilling], len(decoding))
        chunks = [(row, 1) for row in decoding]
        return chunks + [(row, n) for row, n in zip(prefilling, counts, strict=True) if n]

    def _make_room(self) -> None:
        """Free cached tokens: the least recently used finished row, else the youngest running."""
        rows = self._rows
        if rows.kept:
            self._drop(rows.oldest())
            return
        if len(rows.running) < 2:
            raise EngineFailed(
                f"One sequence does not fit the KV cache of {self._kv_tokens} tokens."
            )
        row = rows.running.pop()
        self._model.close_row(row.row)
        row.stop_restoring()
        row.row, row.past, row.leader = -1, 0, None
        rows.waiting.insert(0, row)
        rows.is_crowded = True
        self._preemptions += 1

    def _collect(self, row: Row, count: int, logits: NDArray[np.float32]) -> StepOutput:
        row.past += count
        if row.pending:
            return row.progress()
        token_id, logprob = row.sampler.sample(logits)
        row.tokens.append(token_id)
        row.is_counted = True
        return StepOutput(
            row.spec.id,
            token_id,
            is_end=self._pieces.is_end(token_id),
            logprob=logprob,
            prefilled=len(row.spec.prompt),
            cached=row.reuse.total,
            reuse=row.reuse,
        )

    def counters(self) -> EngineLoad:
        """Return the stepper's own counts."""
        return EngineLoad(
            kv_used_tokens=min(self._used(), self._kv_tokens),
            kv_tokens=self._kv_tokens,
            steps=self._steps,
            preemptions=self._preemptions,
            native_cpu_s=self._model.native_cpu_s,
        )

    def close(self) -> None:
        """Free everything; twice is fine."""
        self._flow.finish()
        self._model.close()
