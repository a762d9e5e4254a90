"""Continuous batching over llama.cpp's low-level API: the Stepper of GGUF models."""

import time
from collections.abc import Iterable

import numpy as np

from backends.base import EngineLoad, EngineOptions, ModelInfo
from backends.engine.prefill import PrefillPlanner
from backends.engine.prompt_scores import PromptScores, piece_tokens
from backends.engine.row_book import RowBook
from backends.engine.rows import BaseStepper
from backends.gguf.batch import Batch
from backends.gguf.blocks import CellBlocks, block_layout
from backends.gguf.model import GgufModel, library, native_log, open_context
from backends.gguf.placement import Placement
from backends.gguf.rows import GgufRow
from backends.gguf.sampling import SequenceSampler
from backends.gguf.slots import KvSlots, count_slots
from backends.gguf.trial import try_context
from backends.prefixes.match import Retained, token_array
from backends.prefixes.pieces import PieceRule
from backends.prefixes.ram import RamPrefixStore
from backends.prefixes.transfer import PrefixTransfer, wait_for_first_block
from backends.stepper import SequenceSpec, StepOutput
from backends.trials import tell
from core.errors import EngineFailed, NonFiniteOutput

_NO_SLOT = 1


class GgufStepper(BaseStepper):
    """Runs up to `max_sequences` rows in one unified KV cache, one llama.cpp sequence id each.

    Every step decodes one token of each running row and prefills a bounded chunk of prompts.
    A new row reuses the longest computed prefix of any running or finished row.  When the cells
    run out, finished rows move to RAM first; then the youngest running row is preempted: it
    loses its cells, waits, and is computed again.  Blocks of finished rows are copied to
    `options.prefix_store` between steps, and restored from there if no cells hold a prompt.

    Attention may read the cells of all rows, with a weight of zero; NaN times zero is NaN.  So
    after a step with logits that are not finite, the cells are cleared and each suspect row is
    computed alone: those that give NaN again have failed, the others go on.
    """

    def __init__(self, info: ModelInfo, model: GgufModel, options: EngineOptions) -> None:
        """Create the context of `options.kv_tokens` cells, and try the model in it.

        What the trial found wrong is not done.  Raises InsufficientMemory, BrokenModel.
        """
        assert options.kv_tokens is not None
        assert options.context_tokens is not None
        self._llama = library()
        self._model = model
        self._context_tokens = options.context_tokens
        # A batch with more outputs than the context has room for ends the process.
        slot_count = self._most_outputs = count_slots(model, options)
        self._context = open_context(model, options, slot_count)
        self._batch = Batch(options.prefill_chunk_tokens + options.max_sequences)
        try:
            result = try_context(info, model, self._context, self._batch, options)
        except BaseException:
            self._llama.llama_free(self._context)
            raise
        self.limitations = tell(info.name, result)
        self._rule = PieceRule(options.deterministic, options.prefill_chunk_tokens)
        is_alone = self._rule.is_fixed or not result.has_batches
        self.max_sequences = 1 if is_alone else options.max_sequences
        whole_beyond = model.whole_beyond if result.has_reuse else 0
        self._store = RamPrefixStore(options.prefix_bytes)
        # The last sequence id is reserved for copying blocks.
        blocks = self._blocks = CellBlocks(self._context, slot_count - 1)
        self._transfer = PrefixTransfer[Retained](
            options.prefix_store,
            self._rule.layout(block_layout(model, options)) if result.has_reuse else None,
            lambda entry, number: blocks.copy(entry.slot, number),
        )
        self._slots = KvSlots(
            self._context, slot_count - 1, self._store, whole_beyond, self._transfer
        )
        self._warm_tokens = options.warm_tokens
        self._planner = PrefillPlanner(options.prefill_chunk_tokens, is_fixed=self._rule.is_fixed)
        self._book = RowBook[GgufRow](self.max_sequences, options.kv_tokens)
        # The first of them is computed now, with no other row in the cells.
        self._suspects: list[GgufRow] = []
        self._placement = Placement(
            self._book,
            self._slots,
            blocks,
            self._transfer,
            self._rule,
            # A sliding window overwrites the cells that could have been shared.
            can_share_running=whole_beyond > options.context_tokens,
            cells=options.kv_tokens,
        )

    def add(self, spec: SequenceSpec) -> None:
        """Queue a sequence; it starts as soon as a slot is free.  Raises RequestError."""
        sampler = SequenceSampler(self._model, spec, self._context_tokens)
        scores = PromptScores.of(spec, lambda token: self._model.piece(token, special=True))
        self._book.add(GgufRow(spec, token_array(spec.prompt), sampler, scores=scores))

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; its cells are kept as a prefix for later ones.  Idempotent."""
        row = self._book.remove(sequence_id)
        if row is None:
            return
        row.sampler.close()
        if row.slot < 0:
            self._trust(row)
        elif self._suspects:
            self._slots.release(row.release_slot())
            self._trust(row)
        else:
            count = self._rule.kept(row.past, row.reusable)
            tokens = row.tokens[: row.past]
            self._slots.keep_start(row.release_slot(), tokens, count, self._book.steps)

    def _discard(self, row: GgufRow) -> None:
        self._book.remove(row.spec.id)
        row.sampler.close()
        if row.slot >= 0:
            self._slots.release(row.release_slot())
        self._trust(row)

    def step(self) -> list[StepOutput]:
        """Do one forward pass; what fails for one row is in its output.

        Raises EngineFailed when llama.cpp fails.
        """
        outputs: list[StepOutput] = []
        self._admit(outputs)
        self._fill_batch(outputs)
        while self._batch.count:
            started, wall = time.thread_time(), time.monotonic()
            code = self._llama.llama_decode(self._context, self._batch.native)
            self._book.native_cpu_s += time.thread_time() - started
            if code == 0:
                break
            if code != _NO_SLOT:
                raise EngineFailed(
                    f"llama.cpp could not compute a step (llama_decode returned {code}): "
                    f"{native_log.take_errors() or 'no reason given'}"
                )
            self._make_room(outputs)
            self._fill_batch(outputs)
        if not self._batch.count:
            if not outputs:
                wait_for_first_block([row.incoming for row in self._book.running])
            return outputs
        self._book.steps += 1
        self._collect(outputs)
        self._slots.cool_down(self._warm_tokens)
        self._copy_blocks()
        self._planner.observe(self._batch.count, time.monotonic() - wall)
        return outputs

    def _admit(self, outputs: list[StepOutput]) -> None:
        for row in self._admissible():
            try:
                if self._suspects:
                    self._placement.place_alone(row)
                elif not self._placement.place(row, self._book.steps):
                    return
                self._book.start(row)
            except BaseException as problem:
                outputs.append(self._failed(row, problem, "its start"))

    def _admissible(self) -> Iterable[GgufRow]:
        if not self._suspects:
            return self._book.admissible()
        return () if self._book.running else self._suspects[:1]

    def _suspect(self, rows: Iterable[GgufRow]) -> None:
        """Compute these rows alone, one after the other, and then all others again."""
        # The youngest first: it is the likeliest, for the others have had good steps.
        self._suspects = list(rows)[::-1]
        self._clear()

    def _trust(self, row: GgufRow) -> None:
        """Suspect a row no more, as it has failed, has ended, or gave a token alone."""
        if row in self._suspects:
            self._suspects.remove(row)
            self._clear()

    def _clear(self) -> None:
        for row in self._book.restart_all():
            self._slots.release(row.release_slot())
        self._slots.clear()

    def _fill_batch(self, outputs: list[StepOutput]) -> None:
        """Fill the batch with one token of each decoding row and with the prompt chunks."""
        self._batch.clear()
        prefilling = []
        for row in list(self._book.running):
            row.output, row.batched, row.scored_from = -1, 0, -1
            if row.pending == 1:
                row.batched = 1
                row.output = self._batch.add(row.slot, row.past, row.tokens[-1:], logits=True)
                continue
            try:
                if self._placement.is_ready(row):
                    prefilling.append(row)
            except BaseException as problem:
                outputs.append(self._failed(row, problem, "the reuse of a computed prefix"))
        context = max((row.past for row in prefilling), default=0)
        chunks = self._planner.plan([row.pending for row in prefilling], self._batch.count, context)
        # Each row has at most one output, but those whose prompt's log-probabilities are wanted.
        spare_outputs = self._most_outputs - len(self._book.running)
        for row, chunk in zip(prefilling, chunks, strict=True):
            if row.needs_scores and chunk:
                chunk = min(chunk, 1 + spare_outputs, piece_tokens(self._model.vocabulary_size))
                spare_outputs -= chunk - 1
            if chunk:
                self._add_chunk(row, chunk)

    def _add_chunk(self, row: GgufRow, chunk: int) -> None:
        is_last = chunk == row.pending
        tokens = row.tokens[row.past : row.past + chunk]
        index = self._batch.add(row.slot, row.past, tokens, logits=is_last)
        row.batched, row.output = chunk, index if is_last else -1
        if row.needs_scores:
            row.scored_from = index - chunk + 1
            self._batch.want_logits(row.scored_from, index)

    def _make_room(self, outputs: list[StepOutput]) -> None:
        """Move the least recently used finished row to RAM, or preempt the youngest running one."""
        if self._slots.drop_oldest():
            return
        problem = self._book.too_long()
        if problem is not None:
            outputs.append(self._failed(self._book.running[-1], problem, "its next step"))
        else:
            self._slots.release(self._book.preempt().release_slot())

    def _collect(self, outputs: list[StepOutput]) -> None:
        batched = [row for row in self._book.running if row.batched]
        not_finite: list[GgufRow] = []
        started = time.thread_time()
        for row in batched:
            if row.scored_from >= 0:
                self._score(row)
            row.past += row.batched
            try:
                outputs.append(row.progress() if row.output < 0 else self._sample(row))
            except NonFiniteOutput as problem:
                if self._suspects:
                    outputs.append(self._failed(row, problem, "its computation"))
                else:
                    not_finite.append(row)
            except BaseException as problem:
                outputs.append(self._failed(row, problem, "the sampling of its next token"))
            else:
                if row.output >= 0:
                    self._trust(row)
        self._book.native_cpu_s += time.thread_time() - started
        if not_finite:
            self._suspect(row for row in batched if row in not_finite or row.output < 0)

    def _score(self, row: GgufRow) -> None:
        """Reduce the logits of a part of a prompt; before sampling, which changes the last."""
        assert row.scores is not None
        size = self._model.vocabulary_size
        for offset in range(row.batched):
            pointer = self._llama.llama_get_logits_ith(self._context, row.scored_from + offset)
            row.scores.add(row.past + offset, np.ctypeslib.as_array(pointer, (size,)))

    def _sample(self, row: GgufRow) -> StepOutput:
        token_id, logprob = row.sampler.sample(self._context, row.output)
        return row.add_token(token_id, logprob, is_end=self._model.is_end(token_id))

    def counters(self) -> EngineLoad:
        """Return the stepper's own counts."""
        return self._book.load(
            self._book.past_tokens + self._slots.retained_tokens,
            self._slots.native_cpu_s + self._blocks.native_cpu_s,
        )

    def close(self) -> None:
        """Free the context and the weights; idempotent."""
        for row in self._book.clear():
            row.sampler.close()
        self._store.clear()
        if self._context:
            self._transfer.finish()
            self._llama.llama_free(self._context)
            self._context = None
        self._model.close()
