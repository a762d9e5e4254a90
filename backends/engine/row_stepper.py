"""Continuous batching over a `RowModel`: the Stepper of PyTorch, ONNX and Core ML models."""

import time

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineLoad, EngineOptions
from backends.engine.prefill import PrefillPlanner
from backends.engine.prompt_scores import PromptScores, all_logits, piece_tokens
from backends.engine.row_book import RowBook
from backends.engine.row_model import Pieces, PortableRows, RowInput, RowModel
from backends.engine.rows import BaseStepper, KeptRow, ModelRow
from backends.engine.sampling import RowSampler
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.match import longest_prefix, token_array
from backends.prefixes.pieces import PieceRule
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.store import State
from backends.prefixes.transfer import (
    Applied,
    PrefixTransfer,
    is_worth_restoring,
    wait_for_first_block,
)
from backends.stepper import SequenceSpec, StepOutput


class RowStepper(BaseStepper):
    """Runs up to `max_sequences` rows; each step appends to all that are ready in one call.

    Every step decodes one token of each running row and prefills a bounded chunk of prompts.
    A new row reuses the longest computed prefix of any running or finished row.  When the tokens
    of all rows would exceed `options.kv_tokens`, finished rows are evicted first; then the
    youngest running row is preempted: it loses its cache, waits, and is computed again.
    """

    def __init__(self, model: RowModel, pieces: Pieces, options: EngineOptions) -> None:
        """Take ownership of `model`; `options` must have `kv_tokens` set."""
        assert options.kv_tokens is not None
        self._model = model
        self._pieces = pieces
        self._rule = PieceRule(options.deterministic, options.prefill_chunk_tokens)
        most = 1 if self._rule.is_fixed else options.max_sequences
        self.max_sequences = min(most, model.max_rows)
        self._book = RowBook[ModelRow](self.max_sequences, options.kv_tokens)
        self._kept: list[KeptRow] = []
        self._planner = PrefillPlanner(options.prefill_chunk_tokens, is_fixed=self._rule.is_fixed)
        portable = model if isinstance(model, PortableRows) else None
        self._portable = portable
        self._transfer = PrefixTransfer[KeptRow](
            options.prefix_store,
            self._rule.layout(portable.layout) if portable else None,
            self._block,
        )

    def add(self, spec: SequenceSpec) -> None:
        """Queue a sequence; it starts as soon as there is room.  Raises RequestError."""
        sampler = RowSampler(spec, self._model.vocabulary_size, self._piece)
        scores = PromptScores.of(spec, self._piece)
        self._book.add(ModelRow(spec, token_array(spec.prompt), sampler, scores=scores))

    def _piece(self, token_id: int) -> bytes:
        return self._pieces.piece(token_id, special=True)

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; its computed tokens stay as a prefix for later ones.  Idempotent."""
        row = self._book.remove(sequence_id)
        if row is None or row.slot < 0:
            return
        slot = row.release_slot()
        length = self._rule.kept(row.past, row.reusable)
        is_whole = length == row.past
        if length >= SMALLEST_PREFIX and (is_whole or self._model.truncate(slot, length)):
            kept = KeptRow(slot, row.tokens[:length], self._book.steps)
            self._kept.append(kept)
            self._transfer.queue(kept, kept.tokens)
        else:
            self._model.close_row(slot)

    def _discard(self, row: ModelRow) -> None:
        self._book.remove(row.spec.id)
        if row.slot >= 0:
            self._model.close_row(row.release_slot())

    def step(self) -> list[StepOutput]:
        """Do one forward pass; what fails for one row is in its output.

        Raises EngineFailed when the runtime fails.
        """
        outputs: list[StepOutput] = []
        self._admit(outputs)
        chunks = self._chunks(outputs)
        while self._used() + sum(count for _, count in chunks) > self._book.kv_tokens:
            self._make_room(outputs)
            chunks = self._chunks(outputs)
        if not chunks:
            if not outputs:
                wait_for_first_block([row.incoming for row in self._book.running])
            return outputs
        started = time.monotonic()
        logits = self._computed(chunks)
        self._book.steps += 1
        for index, (row, count) in enumerate(chunks):
            try:
                outputs.append(self._collect(row, count, logits[index]))
            except BaseException as problem:
                outputs.append(self._failed(row, problem, "the sampling of its next token"))
        self._planner.observe(sum(n for _, n in chunks), time.monotonic() - started)
        self._copy_blocks()
        return outputs

    def _computed(
        self, chunks: list[tuple[ModelRow, int]]
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """Return the logits after each chunk; rows that need scores are computed by themselves."""
        scored = {
            index: self._scored(row, count)
            for index, (row, count) in enumerate(chunks)
            if row.needs_scores
        }
        inputs = [
            RowInput(row.slot, row.tokens[row.past : row.past + count])
            for index, (row, count) in enumerate(chunks)
            if index not in scored
        ]
        if not scored:
            return self._model.extend(inputs)
        others = iter(self._model.extend(inputs) if inputs else ())
        return [scored[i] if i in scored else next(others) for i in range(len(chunks))]

    def _scored(self, row: ModelRow, count: int) -> NDArray[np.float32]:
        """Compute a part of a prompt in pieces, each token's logits; return the last logits."""
        assert row.scores is not None
        size, end = piece_tokens(self._model.vocabulary_size), row.past + count
        for start in range(row.past, end, size):
            tokens = row.tokens[start : min(start + size, end)]
            logits = all_logits(self._model, RowInput(row.slot, tokens))
            row.scores.add_piece(start, logits)
        return np.array(logits[-1])

    def _admit(self, outputs: list[StepOutput]) -> None:
        for row in self._book.admissible():
            try:
                self._place(row)
                self._book.start(row)
            except BaseException as problem:
                outputs.append(self._failed(row, problem, "its start"))

    def _used(self) -> int:
        return self._book.past_tokens + sum(len(kept.tokens) for kept in self._kept)

    @property
    def _open_rows(self) -> int:
        return len(self._book.running) + len(self._kept)

    def _place(self, row: ModelRow) -> None:
        """Give `row` a row of the model that holds the longest computed prefix.

        1. A finished row that is shared whole, or cannot be copied: take it over.
        2. A finished or running row: copy the shared part.
        3. Stored blocks of a former engine, where they are longer: restore them step by step.
        4. Nothing to share, or the request shares nothing: open an empty row.
        """
        if row.needs_scores or not row.spec.reads_cache:
            self._open(row)
            return
        limit = len(row.tokens) - 1
        kept, length = longest_prefix(self._kept, row.tokens[:limit], 1 << 30)
        length = self._rule.whole(length)
        leader, potential = self._book.best_leader(row)
        computed = min(potential, leader.past) if leader is not None else 0
        if length < SMALLEST_PREFIX:
            kept, length = None, 0
        blocks = self._rule.blocks(self._transfer.find(row.tokens[:limit]))
        use_blocks = is_worth_restoring(blocks, max(length, potential))
        planned = len(blocks) * BLOCK_TOKENS if use_blocks else max(length, potential)
        known = [*(each.tokens for each in self._kept), *self._book.running_tokens()]
        reuse = self._transfer.explain_reuse(planned, row.tokens, known)
        if use_blocks:
            row.incoming = self._transfer.restore(row.tokens[:limit], blocks)  # (3)
        elif kept is not None and length >= computed:
            is_whole = length == len(kept.tokens)
            if is_whole or not self._copy(row, kept.slot, length):
                self._take_over(row, kept, length)  # (1)
            else:
                kept.used_at_step = self._book.steps
        elif leader is not None and computed >= SMALLEST_PREFIX:
            self._copy(row, leader.slot, computed)  # (2)
        if row.slot < 0:
            self._open(row)  # (4)
        if leader is not None and not use_blocks:
            row.wait_for(leader, potential)
        if not row.is_reuse_final:
            reuse.cells = row.past
            row.reuse = reuse

    def _open(self, row: ModelRow) -> None:
        self._free_a_row()
        row.slot, row.past = self._model.open_row(row.capacity), 0

    def _take_over(self, row: ModelRow, kept: KeptRow, length: int) -> None:
        self._kept.remove(kept)
        # The row that continues it is kept whole when it ends.
        self._transfer.discard(kept)
        if length == len(kept.tokens) or self._model.truncate(kept.slot, length):
            row.slot, row.past = kept.slot, length
        else:
            self._model.close_row(kept.slot)

    def _copy(self, row: ModelRow, source: int, length: int) -> bool:
        if self._open_rows >= self._model.max_rows:
            spare = [kept for kept in self._kept if kept.slot != source]
            if not spare:
                return False
            self._drop(min(spare, key=lambda kept: kept.used_at_step))
        if self._used() + length > self._book.kv_tokens:
            return False
        copied = self._model.copy_row(source, length, row.capacity)
        if copied is None:
            return False
        row.slot, row.past = copied, length
        return True

    def _free_a_row(self) -> None:
        while self._kept and self._open_rows >= self._model.max_rows:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._drop(min(self._kept, key=lambda kept: kept.used_at_step))

    def _drop(self, kept: KeptRow) -> None:
        self._kept.remove(kept)
        self._transfer.discard(kept)
        self._model.close_row(kept.slot)

    def _share(self, row: ModelRow, source: int, count: int) -> None:
        """Copy the first `count` tokens of another row into `row`, if that saves enough."""
        if count - row.past < SMALLEST_PREFIX:
            return
        before = row.slot
        # The old row is closed only after the copy succeeded.
        if self._copy(row, source, count):
            self._model.close_row(before)
        if not row.is_reuse_final:
            row.reuse.only_cells(row.past)

    def _block(self, kept: KeptRow, number: int) -> State:
        assert self._portable is not None
        return self._portable.read_tokens(kept.slot, number * BLOCK_TOKENS, BLOCK_TOKENS)

    def _append(self, row: ModelRow, state: State) -> Applied:
        while self._used() + BLOCK_TOKENS > self._book.kv_tokens:
            if not self._kept:
                return "no_room"
            self._drop_oldest()
        assert self._portable is not None
        if not self._portable.append_tokens(row.slot, BLOCK_TOKENS, state):
            return "refused"
        row.past += BLOCK_TOKENS
        return "applied"

    def _chunks(self, outputs: list[StepOutput]) -> list[tuple[ModelRow, int]]:
        """Return how many tokens each row computes in this step, decoding rows first."""
        decoding = [row for row in self._book.running if row.pending == 1]
        prefilling: list[ModelRow] = []
        for row in [row for row in self._book.running if row.pending > 1]:
            try:
                if self._is_ready(row):
                    prefilling.append(row)
            except BaseException as problem:
                outputs.append(self._failed(row, problem, "the reuse of a computed prefix"))
        context = max((row.past for row in prefilling), default=0)
        pending = [row.pending for row in prefilling]
        counts = self._planner.plan(pending, len(decoding), context)
        chunks = [(row, 1) for row in decoding]
        return chunks + [(row, n) for row, n in zip(prefilling, counts, strict=True) if n]

    def _is_ready(self, row: ModelRow) -> bool:
        if row.receive(self._append) or row.follow(self._share, least_pending=2):
            return False
        if row.scores is None and self._rule.whole(row.past) < row.past:
            self._restart(row)
        return True

    def _restart(self, row: ModelRow) -> None:
        """Compute a row from its start, as its restored blocks end inside a fixed piece."""
        self._model.close_row(row.slot)
        row.slot, row.past = self._model.open_row(row.capacity), 0
        row.reuse.only_cells(0)

    def _make_room(self, outputs: list[StepOutput]) -> None:
        """Evict the least recently used finished row, or preempt the youngest running one."""
        if self._kept:
            self._drop_oldest()
        elif (problem := self._book.too_long()) is not None:
            outputs.append(self._failed(self._book.running[-1], problem, "its next step"))
        else:
            self._model.close_row(self._book.preempt().release_slot())

    def _collect(self, row: ModelRow, count: int, logits: NDArray[np.float32]) -> StepOutput:
        row.past += count
        if row.pending:
            return row.progress()
        token_id, logprob = row.sampler.sample(logits)
        return row.add_token(token_id, logprob, is_end=self._pieces.is_end(token_id))

    def counters(self) -> EngineLoad:
        """Return the stepper's own counts."""
        return self._book.load(self._used(), self._model.native_cpu_s)

    def close(self) -> None:
        """Free everything; idempotent."""
        self._transfer.finish()
        self._model.close()
